#include "gemm/sm90/mixed.h"

#include "gemm/dispatch/heuristics.h"
#include "gemm/dispatch/table.h"

namespace zimage_mxfp8::detail {
namespace {

// The variant that decodes in registers has no addend.
bool uses_workspace(std::int64_t m, bool has_addend) {
  return has_addend || mixed_sm90_uses_workspace(m);
}

std::size_t workspace(const GemmProblem& problem) {
  return uses_workspace(problem.m, problem.addend_rank > 0) ? mixed_workspace_nbytes_sm90(problem)
                                                            : 0;
}

void run(const GemmTask& task, Workspace memory, CudaStream stream) {
  if (uses_workspace(task.m, task.addend)) {
    mixed_workspace_sm90(task, memory, stream);
  } else {
    mixed_register_sm90(task, stream);
  }
}

}  // namespace

const GemmImplementation kMixedSM90{nullptr, workspace, run};

}  // namespace zimage_mxfp8::detail
