#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "row_scaled/quantize_rows_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;

// Chunks of 16 bytes that a thread keeps in registers between the two passes over a row; longer
// rows are read again.
template <typename Type>
constexpr int kKept = sizeof(typename Type::Storage) == 2 ? 5 : 6;

// One block a row.
template <typename Type, bool aligned>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const QuantizeRowsTask task) {
  using Storage = typename Type::Storage;
  const int64_t row = blockIdx.x;
  const Storage* source = static_cast<const Storage*>(task.source) + row * task.row_stride;
  const auto column_of = [](int chunk) {
    return (int64_t(chunk) * kThreads + threadIdx.x) * kWidth<Type>;
  };

  Elements<Type> kept[kKept<Type>];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) {
    kept[i] = load<Type, aligned>(source, column_of(i), task.cols);
  }
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) amax = max(amax, magnitude<Type>(kept[i]));
  for (int i = kKept<Type>; column_of(i) < task.cols; ++i) {
    amax = max(amax, magnitude<Type>(load<Type, aligned>(source, column_of(i), task.cols)));
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
  const auto encode_and_store = [&](const Elements<Type>& values, int64_t column) {
    const Codes<Type> encoded = encode<Type>(values, factor, zero, !finite);
    if (column + kWidth<Type> <= task.cols && task.cols % kWidth<Type> == 0) {
      *reinterpret_cast<decltype(encoded.vector)*>(codes + column) = encoded.vector;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth<Type>; ++i) {
        if (column + i < task.cols) codes[column + i] = encoded.word[i / 4] >> 8 * (i % 4);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) {
    if (column_of(i) < task.cols) encode_and_store(kept[i], column_of(i));
  }
  for (int i = kKept<Type>; column_of(i) < task.cols; ++i) {
    encode_and_store(load<Type, aligned>(source, column_of(i), task.cols), column_of(i));
  }
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsTask& task, CudaStream stream) {
  const uint32_t rows = checked_count(task.rows);
  if (rows == 0) return;
  with_layout(task.dtype, task.source, task.row_stride, [&](auto type, auto aligned) {
    launch(quantize_rows_kernel<decltype(type), decltype(aligned)::value>, rows, kThreads, stream,
           task);
  });
}

}  // namespace zimage_mxfp8::detail
