#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "row_scaled/quantize_rows_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;

// Chunks of 8 elements that a thread keeps in registers between the two passes over a row; longer
// rows are read again.
template <typename Type>
constexpr int kKept = sizeof(typename Type::Storage) == 2 ? 5 : 3;

// One block a row.
template <typename Type, bool aligned>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const QuantizeRowsTask task) {
  using Storage = typename Type::Storage;
  const int64_t row = blockIdx.x;
  const Storage* source = static_cast<const Storage*>(task.source) + row * task.row_stride;
  const auto column_of = [](int chunk) { return (int64_t(chunk) * kThreads + threadIdx.x) * 8; };

  Elements8<Type> kept[kKept<Type>];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) {
    kept[i] = load8<Type, aligned>(source, column_of(i), task.cols);
  }
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) amax = max(amax, magnitude8<Type>(kept[i]));
  for (int i = kKept<Type>; column_of(i) < task.cols; ++i) {
    amax = max(amax, magnitude8<Type>(load8<Type, aligned>(source, column_of(i), task.cols)));
  }
  __shared__ uint32_t of_warp[kThreads / 32];
  amax = __reduce_max_sync(~0u, amax);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) amax = max(amax, of_warp[i]);

  const float maximum = __uint_as_float(amax);
  const bool finite = amax < kInfinityBits;
  const bool zero = finite && maximum < kSmallestRowMaximum;
  if (threadIdx.x == 0) {
    const float scale = zero ? 0.0f : __fdiv_rn(maximum, 448.0f);
    task.scales[row] = finite ? scale : __uint_as_float(kNaNBits);
  }
  const float factor = __fdiv_rn(448.0f, maximum);
  uint8_t* codes = task.codes + row * task.cols;
  const auto store = [&](const Elements8<Type>& values, int64_t column) {
    uint2 encoded = encode8<Type>(values, factor);
    if (zero) encoded = make_uint2(0, 0);
    if (!finite) encoded = make_uint2(0x7F7F7F7F, 0x7F7F7F7F);
    if (column + 8 <= task.cols && task.cols % 8 == 0) {
      *reinterpret_cast<uint2*>(codes + column) = encoded;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < task.cols)
          codes[column + i] = (i < 4 ? encoded.x : encoded.y) >> 8 * (i % 4);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) {
    if (column_of(i) < task.cols) store(kept[i], column_of(i));
  }
  for (int i = kKept<Type>; column_of(i) < task.cols; ++i) {
    store(load8<Type, aligned>(source, column_of(i), task.cols), column_of(i));
  }
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsTask& task, CudaStream stream) {
  const uint32_t rows = checked_count(task.rows);
  if (rows == 0) return;
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    if (rows_are_aligned(task.source, task.row_stride, sizeof(typename Type::Storage))) {
      launch(quantize_rows_kernel<Type, true>, rows, kThreads, stream, task);
    } else {
      launch(quantize_rows_kernel<Type, false>, rows, kThreads, stream, task);
    }
  });
}

}  // namespace zimage_mxfp8::detail
