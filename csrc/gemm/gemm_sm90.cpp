// The path "sm90": which of its kernels computes a product.
#include "gemm/gemm_sm90.h"

#include <cstdint>

#include "gemm/gemm_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

// From so many tokens on weights are decoded once. On an H100 that was the faster, or as fast, with
// 2,048 tokens.
constexpr std::int64_t kManyTokens = 2048;

}  // namespace

Support supports_sm90() { return {true, ""}; }

std::size_t workspace_sm90(const GemmProblem& problem) {
  return problem.m < kManyTokens ? 0 : workspace_sm90_once(problem);
}

void gemm_sm90(const GemmTask& task, Workspace workspace, CudaStream stream) {
  if (task.m < kManyTokens) {
    gemm_sm90_each(task, stream);
  } else {
    gemm_sm90_once(task, workspace, stream);
  }
}

}  // namespace zimage_mxfp8::detail
