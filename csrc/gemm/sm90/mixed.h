// The variants of the kernel mixed_sm90.
#pragma once

#include <cstddef>

#include "gemm/task.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

// Decodes weights for each tile of tokens, in registers.
void mixed_register_sm90(const GemmTask& task, CudaStream stream);

// Decodes weights once, to the workspace.
std::size_t mixed_workspace_nbytes_sm90(const GemmProblem& problem);
void mixed_workspace_sm90(const GemmTask& task, Workspace workspace, CudaStream stream);

}  // namespace zimage_mxfp8::detail
