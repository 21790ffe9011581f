#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "quantize/quantize_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;

template <typename Type, bool aligned>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const QuantizeTask task, uint32_t steps, uint32_t tiles_per_row,
                    int64_t code_rows, int64_t code_cols) {
  using Storage = typename Type::Storage;
  const uint32_t step = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (step >= steps) return;
  const int lane = threadIdx.x % 32;
  const TileStep at = tile_step(step, tiles_per_row, lane);

  Elements8<Type> values[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = at.row + 32 * i;
    if (row < task.rows) {
      const Storage* source = static_cast<const Storage*>(task.source) + row * task.row_stride;
      values[i] = load8<Type, aligned>(source, at.column, task.cols);
    }
  }
  uint32_t scales[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t amax = magnitude8<Type>(values[i]);
    amax = max(amax, __shfl_xor_sync(~0u, amax, 1));
    amax = max(amax, __shfl_xor_sync(~0u, amax, 2));
    const uint32_t byte = scale_byte(amax);
    const int64_t row = at.row + 32 * i;
    if (row < code_rows && at.column < code_cols) {
      uint2 codes = encode8<Type>(values[i], power_of_two(127 - int(byte == 255 ? 127 : byte)));
      if (amax < kTinyBits) codes = make_uint2(0, 0);
      if (byte == 255) codes = make_uint2(0x7F7F7F7F, 0x7F7F7F7F);
      *reinterpret_cast<uint2*>(task.codes + row * code_cols + at.column) = codes;
    }
    // The four blocks of this row side by side, in each of the 16 lanes.
    uint32_t word = byte << 8 * (lane / 4 % 4);
    word |= __shfl_xor_sync(~0u, word, 4);
    scales[i] = word | __shfl_xor_sync(~0u, word, 8);
  }
  if (lane % 16 == 0) {
    *reinterpret_cast<uint4*>(task.scales + at.scale_offset) =
        make_uint4(scales[0], scales[1], scales[2], scales[3]);
  }
}

}  // namespace

void quantize_cuda(const QuantizeTask& task, CudaStream stream) {
  const MXFP8Shape shape{task.rows, task.cols};
  const uint32_t steps = checked_count(tile_steps(task.rows, task.cols));
  if (steps == 0) return;
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto launch_with = [&](auto kernel) {
      launch(kernel, grid_for(steps, kThreads / 32), kThreads, stream, task, steps,
             static_cast<uint32_t>(ceil_div(task.cols, 128)), shape.code_rows(), shape.code_cols());
    };
    if (rows_are_aligned(task.source, task.row_stride, sizeof(typename Type::Storage))) {
      launch_with(quantize_kernel<Type, true>);
    } else {
      launch_with(quantize_kernel<Type, false>);
    }
  });
}

}  // namespace zimage_mxfp8::detail
