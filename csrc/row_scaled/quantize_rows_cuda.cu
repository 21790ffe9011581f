#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "row_scaled/encode_row.cuh"
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
  const RowEncoder encoder(block_max(amax, of_warp));
  if (threadIdx.x == 0) task.scales[row] = encoder.scale();
  uint8_t* codes = task.codes + row * task.cols;
#pragma unroll
  for (int i = 0; i < kKept<Type>; ++i) {
    if (column_of(i) < task.cols) {
      store_codes<Type>(encoder.encode(kept[i]), codes, column_of(i), task.cols);
    }
  }
  for (int i = kKept<Type>; column_of(i) < task.cols; ++i) {
    const auto values = load<Type, aligned>(source, column_of(i), task.cols);
    store_codes<Type>(encoder.encode(values), codes, column_of(i), task.cols);
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
