#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "dequantize/dequantize_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;

template <typename Type, bool aligned>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const DequantizeTask task, uint32_t steps, uint32_t tiles_per_row,
                      int64_t code_cols) {
  using Storage = typename Type::Storage;
  const uint32_t step = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (step >= steps) return;
  const int lane = threadIdx.x % 32;
  const TileStep at = tile_step(step, tiles_per_row, lane);
  if (at.column >= task.cols) return;

  const uint4 scales = __ldg(reinterpret_cast<const uint4*>(task.scales + at.scale_offset));
  const uint32_t words[4] = {scales.x, scales.y, scales.z, scales.w};
  uint2 codes[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = at.row + 32 * i;
    if (row < task.rows) {
      codes[i] = __ldg(reinterpret_cast<const uint2*>(task.codes + row * code_cols + at.column));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = at.row + 32 * i;
    if (row < task.rows) {
      const uint32_t byte = words[i] >> 8 * (lane / 4 % 4) & 0xFF;
      Storage* target = static_cast<Storage*>(task.target) + row * task.row_stride;
      store8_of_pair<Type, aligned>(decode8<Type>(codes[i], byte), target, at.column, task.cols);
    }
  }
}

}  // namespace

void dequantize_cuda(const DequantizeTask& task, CudaStream stream) {
  const uint32_t steps = checked_count(tile_steps(task.rows, task.cols));
  if (steps == 0) return;
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto launch_with = [&](auto kernel) {
      launch(kernel, grid_for(steps, kThreads / 32), kThreads, stream, task, steps,
             static_cast<uint32_t>(ceil_div(task.cols, 128)),
             MXFP8Shape{task.rows, task.cols}.code_cols());
    };
    if (rows_are_aligned(task.target, task.row_stride, sizeof(typename Type::Storage))) {
      launch_with(dequantize_kernel<Type, true>);
    } else {
      launch_with(dequantize_kernel<Type, false>);
    }
  });
}

}  // namespace zimage_mxfp8::detail
