// Block-scaled kernels of CUTLASS, behind functions without CUTLASS types.
#pragma once

#include <cstddef>

#include "gemm/dispatch/kernel.h"

namespace zimage_mxfp8::detail {

// One tile and one output type.
struct BlockScaledVariant {
  std::size_t (*workspace)(const GemmTask& task);
  void (*run)(const GemmTask& task, Workspace workspace, CudaStream stream);
};

// Each is block_scaled.cu, compiled with other settings (csrc/CMakeLists.txt).
extern const BlockScaledVariant kSM100LargeBF16, kSM100MediumBF16, kSM100SmallBF16, kSM100SmallF32,
    kSM120BF16, kSM120F32;

// A GEMM with the variant for its output: `bf16`, or `f32` and then bias and rounding to F16.
std::size_t workspace_block_scaled(const BlockScaledVariant& bf16, const BlockScaledVariant& f32,
                                   const GemmProblem& problem);
void gemm_block_scaled(const BlockScaledVariant& bf16, const BlockScaledVariant& f32,
                       const GemmTask& task, Workspace workspace, CudaStream stream);

}  // namespace zimage_mxfp8::detail
