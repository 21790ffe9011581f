#include "gemm/sm90/mixed.h"

#include "gemm/dispatch/heuristics.h"
#include "gemm/dispatch/table.h"

namespace zimage_mxfp8::detail {
namespace {

std::size_t workspace(const GemmProblem& problem) {
  return mixed_sm90_uses_workspace(problem.m) ? mixed_workspace_nbytes_sm90(problem) : 0;
}

void run(const GemmTask& task, Workspace memory, CudaStream stream) {
  if (mixed_sm90_uses_workspace(task.m)) {
    mixed_workspace_sm90(task, memory, stream);
  } else {
    mixed_register_sm90(task, stream);
  }
}

}  // namespace

const GemmImplementation kMixedSM90{nullptr, workspace, run};

}  // namespace zimage_mxfp8::detail
