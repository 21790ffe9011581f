#include "gemm/blackwell/block_scaled.h"
#include "gemm/dispatch/table.h"

namespace zimage_mxfp8::detail {
namespace {

std::size_t workspace(const GemmProblem& problem) {
  return workspace_block_scaled(kSM120BF16, kSM120F32, problem);
}

void run(const GemmTask& task, Workspace memory, CudaStream stream) {
  gemm_block_scaled(kSM120BF16, kSM120F32, task, memory, stream);
}

}  // namespace

const GemmImplementation kMXFP8SM120{nullptr, workspace, run};

}  // namespace zimage_mxfp8::detail
