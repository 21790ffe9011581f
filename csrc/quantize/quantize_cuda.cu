#include "cuda/tiles.cuh"
#include "quantize/quantize_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

template <typename Type, bool aligned>
__global__ void __launch_bounds__(kTileThreads)
    quantize_kernel(const QuantizeTask task, const TileSteps steps) {
  using Storage = typename Type::Storage;
  const uint32_t step = step_of_warp();
  if (step >= steps.count) return;
  const int lane = threadIdx.x % 32;
  const TileStep at = tile_step<Type>(steps, step, lane);

  Elements<Type> values[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = at.row + 32 * i;
    if (row < task.rows) {
      const Storage* source = static_cast<const Storage*>(task.source) + row * task.row_stride;
      values[i] = load<Type, aligned>(source, at.column, task.cols);
    }
  }
  uint32_t scales[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t amax = magnitude<Type>(values[i]);
#pragma unroll
    for (int mask = 1; mask < kBlockLanes<Type>; mask *= 2) {
      amax = max(amax, __shfl_xor_sync(~0u, amax, mask));
    }
    const uint32_t byte = scale_byte(amax);
    const int64_t row = at.row + 32 * i;
    if (row < steps.code_rows && at.column < steps.code_cols) {
      const float factor = power_of_two(127 - int(byte == 255 ? 127 : byte));
      const Codes<Type> codes = encode<Type>(values[i], factor, amax < kTinyBits, byte == 255);
      uint8_t* target = task.codes + row * steps.code_cols + at.column;
      *reinterpret_cast<decltype(codes.vector)*>(target) = codes.vector;
    }
    // The four blocks of this row side by side, in each of its lanes.
    uint32_t word = byte << 8 * at.block;
    word |= __shfl_xor_sync(~0u, word, kBlockLanes<Type>);
    scales[i] = word | __shfl_xor_sync(~0u, word, 2 * kBlockLanes<Type>);
  }
  if (lane % kRowLanes<Type> == 0) {
    *reinterpret_cast<uint4*>(task.scales + at.scale_offset) =
        make_uint4(scales[0], scales[1], scales[2], scales[3]);
  }
}

}  // namespace

void quantize_cuda(const QuantizeTask& task, CudaStream stream) {
  with_layout(task.dtype, task.source, task.row_stride, [&](auto type, auto aligned) {
    using Type = decltype(type);
    launch_over_tiles<Type>(quantize_kernel<Type, decltype(aligned)::value>, task, stream);
  });
}

}  // namespace zimage_mxfp8::detail
