// The variants of the kernel mixed_sm90.
#pragma once

#include <cstddef>

#include "gemm/task.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

// Decodes weights for each tile of tokens, in registers.
void gemm_sm90_each(const GemmTask& task, CudaStream stream);

// Decodes weights once, to the workspace.
std::size_t workspace_sm90_once(const GemmProblem& problem);
void gemm_sm90_once(const GemmTask& task, Workspace workspace, CudaStream stream);

}  // namespace zimage_mxfp8::detail
