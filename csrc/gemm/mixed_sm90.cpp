#include "gemm/mixed_sm90.h"

#include "gemm/heuristics.h"
#include "gemm/table.h"

namespace zimage_mxfp8::detail {
namespace {

std::size_t workspace(const GemmProblem& problem) {
  return mixed_sm90_uses_workspace(problem.m) ? workspace_sm90_once(problem) : 0;
}

void run(const GemmTask& task, Workspace memory, CudaStream stream) {
  if (mixed_sm90_uses_workspace(task.m)) {
    gemm_sm90_once(task, memory, stream);
  } else {
    gemm_sm90_each(task, stream);
  }
}

}  // namespace

const GemmImplementation kMixedSM90{nullptr, workspace, run};

}  // namespace zimage_mxfp8::detail
