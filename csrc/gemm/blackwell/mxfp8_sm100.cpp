#include "cuda/runtime.h"
#include "gemm/blackwell/block_scaled.h"
#include "gemm/dispatch/heuristics.h"
#include "gemm/dispatch/table.h"

namespace zimage_mxfp8::detail {
namespace {

const BlockScaledVariant& variant(std::int64_t m, std::int64_t n) {
  switch (sm100_tile(m, n, multiprocessors(current_device()))) {
    case SM100Tile::k128x128:
      return kSM100SmallBF16;
    case SM100Tile::k256x128:
      return kSM100MediumBF16;
    case SM100Tile::k256x256:
      break;
  }
  return kSM100LargeBF16;
}

std::size_t workspace(const GemmProblem& problem) {
  return workspace_block_scaled(variant(problem.m, problem.n), kSM100SmallF32, problem);
}

void run(const GemmTask& task, Workspace memory, CudaStream stream) {
  gemm_block_scaled(variant(task.m, task.n), kSM100SmallF32, task, memory, stream);
}

}  // namespace

const GemmImplementation kMXFP8SM100{nullptr, workspace, run};

}  // namespace zimage_mxfp8::detail
