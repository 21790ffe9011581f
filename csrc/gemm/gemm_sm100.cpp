#include "cuda/runtime.h"
#include "gemm/block_scaled.h"

namespace zimage_mxfp8::detail {
namespace {

// Chosen by counting: what fits the chip in whole waves is never measured here, for want of one.
//   few rows (128 or less)                              -> 128x128, one SM a tile
//   256x256 tiles for two waves or more of all SM pairs -> 256x256, two SMs a tile
//   otherwise                                           -> 256x128, two SMs a tile
const BlockScaledVariant& choose(std::int64_t m, std::int64_t n) {
  if (m <= 128) return kSM100SmallBF16;
  const std::int64_t pairs = multiprocessors(current_device()) / 2;
  const std::int64_t large_tiles = ceil_div(m, 256) * ceil_div(n, 256);
  return large_tiles >= 2 * pairs ? kSM100LargeBF16 : kSM100MediumBF16;
}

}  // namespace

Support supports_sm100() { return {true, ""}; }

std::size_t workspace_sm100(const GemmProblem& problem) {
  return workspace_block_scaled(choose(problem.m, problem.n), kSM100SmallF32, problem);
}

void gemm_sm100(const GemmTask& task, Workspace workspace, CudaStream stream) {
  gemm_block_scaled(choose(task.m, task.n), kSM100SmallF32, task, workspace, stream);
}

}  // namespace zimage_mxfp8::detail
