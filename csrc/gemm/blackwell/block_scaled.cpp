#include "gemm/blackwell/block_scaled.h"

#include "gemm/finish.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {
namespace {

// Sums in float32, at the end of the workspace, for outputs that no kernel writes.
std::size_t sums_bytes(const GemmTask& task) {
  return task.d_dtype == DType::kFloat16 ? static_cast<std::size_t>(task.m * task.n) * 4 : 0;
}

std::size_t own_bytes(const BlockScaledVariant& variant, const GemmTask& task) {
  return static_cast<std::size_t>(
      round_up(static_cast<std::int64_t>(variant.workspace(task)), 256));
}

const BlockScaledVariant& choose(const BlockScaledVariant& bf16, const BlockScaledVariant& f32,
                                 DType dtype) {
  return dtype == DType::kBFloat16 ? bf16 : f32;
}

}  // namespace

std::size_t workspace_block_scaled(const BlockScaledVariant& bf16, const BlockScaledVariant& f32,
                                   const GemmProblem& problem) {
  GemmTask task{};
  task.m = problem.m;
  task.n = problem.n;
  task.k = problem.k;
  task.d_dtype = problem.d;
  task.d_row_stride = problem.n;
  return own_bytes(choose(bf16, f32, problem.d), task) + sums_bytes(task);
}

void gemm_block_scaled(const BlockScaledVariant& bf16, const BlockScaledVariant& f32,
                       const GemmTask& task, Workspace workspace, CudaStream stream) {
  const BlockScaledVariant& variant = choose(bf16, f32, task.d_dtype);
  if (sums_bytes(task) == 0) return variant.run(task, workspace, stream);
  GemmTask sums = task;
  sums.d = static_cast<char*>(workspace.data) + own_bytes(variant, task);
  sums.d_dtype = DType::kFloat32;
  sums.d_row_stride = task.n;
  sums.bias = nullptr;
  variant.run(sums, workspace, stream);
  gemm_finish(static_cast<const float*>(sums.d), task.n, task, stream);
}

}  // namespace zimage_mxfp8::detail
