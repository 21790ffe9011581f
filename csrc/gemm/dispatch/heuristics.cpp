#include "gemm/dispatch/heuristics.h"

#include <limits>

#include "gemm/sm90/fused_order.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {
namespace {

// ---- NVIDIA H100 80GB HBM3 (SXM), CUDA 13.0, commit 78d9177; docs/performance.md, "GEMM kernels"

// BF16 x MXFP8. Decoding all weights first takes as long for few tokens as for many; mixed_sm90 has
// tiles for the whole device from 4,096 tokens on, or from half of that if there are many weights.
constexpr std::int64_t kDequantizeFrom = 1024;        // tokens
constexpr std::int64_t kMixedFillsDevice = 4096;      // tokens
constexpr std::int64_t kMixedFillsDeviceWide = 2048;  // tokens, if N > K
constexpr std::int64_t kDequantizeFromAgain = 8192;   // tokens

// mixed_sm90: decoding once was faster, or as fast, with 2,048 tokens.
constexpr std::int64_t kMixedWorkspaceFrom = 2048;  // tokens

// mixed_sm90 in registers: half of the multiprocessors with whole tiles are better than all of them
// with parts of K.
constexpr std::int64_t kMixedPartsPerTile = 2;

// fp8_sm90 with a fused epilogue against fp8_rowwise and a launch of its own: faster at a wave
// utilization of 0.91 and more, slower at 0.78 and less. On an H200, whose memory is faster, it was
// up to 5 % slower at 0.91 to 1 too.
constexpr double kFusedBreakEven = 0.85;

// ---- NVIDIA H200, commit 91eb7fa; docs/performance.md, "INT8"

// Hopper's older instructions have half the rate of wgmma.
constexpr double kWgmmaInt8Cost = 0.5;

// ---- By counting waves. Not measured: no Blackwell GPU was available.

// Few rows take one SM per tile; 256x256 tiles need two waves of all pairs of SMs.
constexpr std::int64_t kSM100FewRows = 128;
constexpr std::int64_t kSM100LargeTileWaves = 2;
// Block-scaled tensor cores have twice the rate of BF16.
constexpr double kBlockScaledCost = 0.5;

constexpr double kOnlyByName = std::numeric_limits<double>::infinity();

// The longest that a cluster takes, in units: on an H200, commit 7e5c1e6, a unit of halves took as
// long as two others where there were few waves.
std::int64_t fused_waves(const FusedOrder& order, std::int64_t clusters) {
  return order.waves(clusters) + (order.ends_half ? 1 : 0);
}

bool dequantize_is_faster_than_mixed(const GemmProblem& problem) {
  const std::int64_t filled = problem.n > problem.k ? kMixedFillsDeviceWide : kMixedFillsDevice;
  return problem.m >= kDequantizeFromAgain || (problem.m >= kDequantizeFrom && problem.m < filled);
}

}  // namespace

double cost_reference(const GemmProblem&, const CudaDevice&) { return kOnlyByName; }

double cost_dequantize(const GemmProblem&, const CudaDevice&) { return 1; }

double cost_mixed_sm90(const GemmProblem& problem, const CudaDevice&) {
  return dequantize_is_faster_than_mixed(problem) ? 1.1 : 0.9;
}

double cost_fp8_rowwise(const GemmProblem&, const CudaDevice&) { return 1; }

double cost_fp8_sm90(const GemmProblem& problem, const CudaDevice& device) {
  const std::int64_t clusters = device.multiprocessors / kFusedCluster;
  const FusedOrder order = fused_order(problem.m, ceil_div(problem.n, kFusedTileN), clusters);
  const double slots = static_cast<double>(fused_waves(order, clusters) * clusters);
  return kFusedBreakEven * slots / static_cast<double>(order.units());
}

double cost_int8_sm90(const GemmProblem&, const CudaDevice&) { return kWgmmaInt8Cost; }

double cost_int8_sm80(const GemmProblem&, const CudaDevice&) { return 1; }

double cost_mxfp8_sm100(const GemmProblem&, const CudaDevice&) { return kBlockScaledCost; }

double cost_mxfp8_sm120(const GemmProblem&, const CudaDevice&) { return kBlockScaledCost; }

bool int8_sm90_takes_narrow_tiles(std::int64_t m, std::int64_t n, int multiprocessors) {
  // Waves of clusters, times the duration of a tile, which is proportional to its rows of B.
  const auto duration = [&](std::int64_t rows) {
    const std::int64_t clusters = multiprocessors / kFusedCluster;
    return fused_waves(fused_order(m, ceil_div(n, rows), clusters), clusters) * rows;
  };
  return duration(kInt8SM90NarrowTileN) < duration(kFusedTileN);
}

bool mixed_sm90_uses_workspace(std::int64_t m) { return m >= kMixedWorkspaceFrom; }

MixedRegisterTile mixed_register_tile(std::int64_t m, std::int64_t n, int multiprocessors) {
  if (m > 128) return MixedRegisterTile::k192x128;
  if (ceil_div(n, 128) * kMixedPartsPerTile >= multiprocessors) {
    return m <= 64 ? MixedRegisterTile::k64x128 : MixedRegisterTile::k128x128;
  }
  if (m <= 32) return MixedRegisterTile::k32x64;
  return m <= 64 ? MixedRegisterTile::k64x64 : MixedRegisterTile::k128x64;
}

MixedWorkspaceTile mixed_workspace_tile(std::int64_t m, std::int64_t n, int multiprocessors) {
  // Waves of clusters, times the duration of a tile, which is proportional to its weights. Larger
  // tiles are read less often, but the last of them may leave multiprocessors idle.
  const auto duration = [&](std::int64_t weights) {
    const std::int64_t tiles = ceil_div(m, 192) * ceil_div(n, 2 * weights);
    return ceil_div(tiles, multiprocessors / 2) * weights;
  };
  return duration(192) <= duration(128) ? MixedWorkspaceTile::k192 : MixedWorkspaceTile::k128;
}

SM100Tile sm100_tile(std::int64_t m, std::int64_t n, int multiprocessors) {
  if (m <= kSM100FewRows) return SM100Tile::k128x128;
  const std::int64_t large = ceil_div(m, 256) * ceil_div(n, 256);
  const std::int64_t pairs = multiprocessors / 2;
  return large >= kSM100LargeTileWaves * pairs ? SM100Tile::k256x256 : SM100Tile::k256x128;
}

}  // namespace zimage_mxfp8::detail
