#pragma once

#include "zimage_mxfp8/fused_gemm.h"

namespace zimage_mxfp8::detail {

// The operations of fused_gemm.h for compute capability 9.0, where supports_sm90()
// (gemm/gemm_cuda.h) says that the build has it, with arguments that are checked, and at least one
// row, column and element of K.

// What a product with A [m, K] and B [n, K] keeps busy of a device, 0 to 1.
double utilization_sm90(std::int64_t m, std::int64_t n, int device);
void gemm_silu_multiply_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                             const MatrixView& target, CudaStream stream);
void gemm_rotate_heads_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                            const void* q_weight, const void* k_weight,
                            const ConstMatrixView& rotations, std::int64_t heads, float eps,
                            const MatrixView& target, CudaStream stream);

}  // namespace zimage_mxfp8::detail
