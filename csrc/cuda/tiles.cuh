// How a matrix and its MXFP8 encoding are divided among warps, and the launch of such kernels.
#pragma once

#include <stdint.h>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

constexpr int kTileThreads = 256;

// A tile of 128 rows and 128 columns has 128x4 scales. A warp takes a step of it: one row or two,
// and those 32, 64 and 96 below; their scales are adjacent in the blocked layout. A lane holds
// kWidth elements of 4 rows.
template <typename Type>
constexpr int kBlockLanes = int(kBlockSize) / kWidth<Type>;  // that share a block
template <typename Type>
constexpr int kRowLanes = 4 * kBlockLanes<Type>;  // that share a row
template <typename Type>
constexpr int kStepRows = 32 / kRowLanes<Type>;
template <typename Type>
constexpr int kTileSteps = 32 / kStepRows<Type>;

// The steps of a matrix, and the shape of its codes.
struct TileSteps {
  uint32_t count;
  uint32_t tiles_per_row;
  int64_t code_rows, code_cols;
};

// A lane's part of a step.
struct TileStep {
  int64_t row;           // its first; the others are 32, 64 and 96 below
  int64_t column;        // its first
  int block;             // of the four in a row of the tile
  int64_t scale_offset;  // of the 16 scales of its rows
};

// The step of this warp; there is one if it is less than TileSteps::count.
__device__ inline uint32_t step_of_warp() {
  return blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32;
}

template <typename Type>
__device__ TileStep tile_step(const TileSteps& steps, uint32_t step, int lane) {
  const uint32_t tile = step % steps.tiles_per_row, rest = step / steps.tiles_per_row;
  const int64_t tile_row = rest / kTileSteps<Type>;
  const int row = int(rest % kTileSteps<Type>) * kStepRows<Type> + lane / kRowLanes<Type>;
  const int lane_of_row = lane % kRowLanes<Type>;
  return {tile_row * 128 + row, int64_t(tile) * 128 + lane_of_row * kWidth<Type>,
          lane_of_row / kBlockLanes<Type>,
          (tile_row * steps.tiles_per_row + tile) * 512 + row * 16};
}

// Launches kernel(task, steps) with one warp per step; `Type` is that of the plain matrix.
template <typename Type, typename Task>
void launch_over_tiles(void (*kernel)(Task, TileSteps), const Task& task, CudaStream stream) {
  const MXFP8Shape shape{task.rows, task.cols};
  const int64_t tiles_per_row = ceil_div(task.cols, 128);
  const int64_t count = ceil_div(task.rows, 128) * tiles_per_row * kTileSteps<Type>;
  if (count == 0) return;
  const TileSteps steps{checked_count(count), static_cast<uint32_t>(tiles_per_row),
                        shape.code_rows(), shape.code_cols()};
  launch(kernel, grid_for(steps.count, kTileThreads / 32), kTileThreads, stream, task, steps);
}

}  // namespace zimage_mxfp8::detail
