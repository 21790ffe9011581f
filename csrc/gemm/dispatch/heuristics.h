// Every threshold by which a GEMM kernel, or a variant of one, is chosen. Host code without CUDA.
//
// A cost is an estimated duration relative to the other kernels for the same problem on the same
// device: the smaller one wins, equal ones in the order of the table. 1 is a kernel at its usual
// speed, with the epilogue as a launch of its own if the problem has one. Infinity means that the
// kernel only runs if it is chosen by name.
#pragma once

#include <cstdint>

#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

double cost_reference(const GemmProblem& problem, const CudaDevice& device);
double cost_dequantize(const GemmProblem& problem, const CudaDevice& device);
double cost_mixed_sm90(const GemmProblem& problem, const CudaDevice& device);
double cost_fp8_rowwise(const GemmProblem& problem, const CudaDevice& device);
double cost_fp8_sm90(const GemmProblem& problem, const CudaDevice& device);
double cost_int8_sm90(const GemmProblem& problem, const CudaDevice& device);
double cost_int8_sm80(const GemmProblem& problem, const CudaDevice& device);
double cost_mxfp8_sm100(const GemmProblem& problem, const CudaDevice& device);
double cost_mxfp8_sm120(const GemmProblem& problem, const CudaDevice& device);

// Narrow tiles of int8_sm90, for GEMMs without an epilogue.
inline constexpr std::int64_t kInt8SM90NarrowTileN = 192;
bool int8_sm90_takes_narrow_tiles(std::int64_t m, std::int64_t n, int multiprocessors);

// Whether mixed_sm90 decodes the weights once, to the workspace, instead of in registers for each
// tile of tokens.
bool mixed_sm90_uses_workspace(std::int64_t m);

// Tiles of mixed_sm90 with weights in registers: tokens x weights.
enum class MixedRegisterTile : std::uint8_t {
  k32x64,
  k64x64,
  k64x128,
  k128x64,
  k128x128,
  k192x128
};
MixedRegisterTile mixed_register_tile(std::int64_t m, std::int64_t n, int multiprocessors);

// Tiles of mixed_sm90 with weights in the workspace: 192 tokens and as many weights, for each of
// the two blocks of a cluster.
enum class MixedWorkspaceTile : std::uint8_t { k128, k192 };
MixedWorkspaceTile mixed_workspace_tile(std::int64_t m, std::int64_t n, int multiprocessors);

enum class SM100Tile : std::uint8_t { k128x128, k256x128, k256x256 };
SM100Tile sm100_tile(std::int64_t m, std::int64_t n, int multiprocessors);

}  // namespace zimage_mxfp8::detail
