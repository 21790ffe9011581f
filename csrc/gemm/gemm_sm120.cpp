#include "gemm/block_scaled.h"

namespace zimage_mxfp8::detail {

Support supports_sm120() { return {true, ""}; }

std::size_t workspace_sm120(const GemmProblem& problem) {
  return workspace_block_scaled(kSM120BF16, kSM120F32, problem);
}

void gemm_sm120(const GemmTask& task, Workspace workspace, CudaStream stream) {
  gemm_block_scaled(kSM120BF16, kSM120F32, task, workspace, stream);
}

}  // namespace zimage_mxfp8::detail
