#include "cuda/tiles.cuh"
#include "dequantize/dequantize_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

template <typename Type, bool aligned>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_kernel(const DequantizeTask task, const TileSteps steps) {
  using Storage = typename Type::Storage;
  const uint32_t step = step_of_warp();
  if (step >= steps.count) return;
  const TileStep at = tile_step<Type>(steps, step, threadIdx.x % 32);
  if (at.column >= task.cols) return;

  const uint4 scales = __ldg(reinterpret_cast<const uint4*>(task.scales + at.scale_offset));
  const uint32_t words[4] = {scales.x, scales.y, scales.z, scales.w};
  Codes<Type> codes[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = at.row + 32 * i;
    if (row < task.rows) {
      const uint8_t* source = task.codes + row * steps.code_cols + at.column;
      codes[i].vector = __ldg(reinterpret_cast<const decltype(codes[i].vector)*>(source));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = at.row + 32 * i;
    if (row < task.rows) {
      const uint32_t byte = words[i] >> 8 * at.block & 0xFF;
      Storage* target = static_cast<Storage*>(task.target) + row * task.row_stride;
      store<Type, aligned>(decode<Type>(codes[i], byte), target, at.column, task.cols);
    }
  }
}

}  // namespace

void dequantize_cuda(const DequantizeTask& task, CudaStream stream) {
  with_layout(task.dtype, task.target, task.row_stride, [&](auto type, auto aligned) {
    using Type = decltype(type);
    launch_over_tiles<Type>(dequantize_kernel<Type, decltype(aligned)::value>, task, stream);
  });
}

}  // namespace zimage_mxfp8::detail
