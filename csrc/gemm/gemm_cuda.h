// The paths on CUDA devices. Arguments are checked, the path supports the problem and the workspace
// is large enough.
#pragma once

#include <cstddef>

#include "gemm/task.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

void gemm_emulated_cuda(const GemmTask& task, CudaStream stream);

// In version `minimum` (120900 is 12.9.0) or newer.
Support supports_cublaslt(std::size_t minimum);
std::size_t workspace_decode(const GemmProblem& problem);
void gemm_decode(const GemmTask& task, Workspace workspace, CudaStream stream);
std::size_t workspace_row_scaled(const GemmProblem& problem);
void gemm_row_scaled(const GemmTask& task, Workspace workspace, CudaStream stream);

Support supports_sm90();
std::size_t workspace_sm90(const GemmProblem& problem);
void gemm_sm90(const GemmTask& task, Workspace workspace, CudaStream stream);

Support supports_sm100();
std::size_t workspace_sm100(const GemmProblem& problem);
void gemm_sm100(const GemmTask& task, Workspace workspace, CudaStream stream);

Support supports_sm120();
std::size_t workspace_sm120(const GemmProblem& problem);
void gemm_sm120(const GemmTask& task, Workspace workspace, CudaStream stream);

// D = source + bias, where `source` is [m, n] float32 and may be D itself.
void gemm_finish(const float* source, int64_t source_row_stride, const GemmTask& task,
                 CudaStream stream);

}  // namespace zimage_mxfp8::detail
