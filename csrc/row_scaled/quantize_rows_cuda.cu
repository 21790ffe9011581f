#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "row_scaled/encode_row.cuh"
#include "row_scaled/quantize_rows_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;

// Work per row: `threads` threads share it, and each keeps up to `kept` chunks of 16 bytes in
// registers between the two passes over the row; the rest of a longer row is read again.
template <int threads_, int kept_>
struct Division {
  static constexpr int threads = threads_;
  static constexpr int kept = kept_;
};

// Rows that a warp can keep need no barrier.
using ShortRow = Division<32, 16>;
using LongRow = Division<kThreads, 6>;

// Loads elements of a row, zeros from `cols` on. A `whole` row consists of chunks of 16 bytes; that
// leaves one predicate, so that the loads of all chunks overlap.
template <typename Type, bool whole>
__device__ Elements<Type> load_chunk(const typename Type::Storage* row, int64_t column,
                                     int64_t cols) {
  if constexpr (!whole) return load<Type, false>(row, column, cols);
  Elements<Type> chunk;
  chunk.vector = make_uint4(0, 0, 0, 0);
  if (column < cols) chunk.vector = __ldg(reinterpret_cast<const uint4*>(row + column));
  return chunk;
}

template <typename Type, bool whole, class Row>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const QuantizeRowsTask task) {
  using Storage = typename Type::Storage;
  constexpr int kRows = kThreads / Row::threads;  // of a block
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / Row::threads;
  if (row >= task.rows) return;
  const Storage* source = static_cast<const Storage*>(task.source) + row * task.row_stride;
  const auto column_of = [](int chunk) {
    return (int64_t(chunk) * Row::threads + threadIdx.x % Row::threads) * kWidth<Type>;
  };

  Elements<Type> kept[Row::kept];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < Row::kept; ++i) {
    kept[i] = load_chunk<Type, whole>(source, column_of(i), task.cols);
  }
#pragma unroll
  for (int i = 0; i < Row::kept; ++i) amax = max(amax, magnitude<Type>(kept[i]));
  for (int i = Row::kept; column_of(i) < task.cols; ++i) {
    amax = max(amax, magnitude<Type>(load_chunk<Type, whole>(source, column_of(i), task.cols)));
  }
  if constexpr (kRows > 1) {
    static_assert(Row::threads == 32);
    amax = __reduce_max_sync(~0u, amax);
  } else {
    __shared__ uint32_t of_warp[kThreads / 32];
    amax = block_max(amax, of_warp);
  }
  const RowEncoder encoder(amax);
  if (threadIdx.x % Row::threads == 0) task.scales[row] = encoder.scale();
  uint8_t* codes = task.codes + row * task.cols;
#pragma unroll
  for (int i = 0; i < Row::kept; ++i) {
    if (column_of(i) < task.cols) {
      store_codes<Type>(encoder.encode(kept[i]), codes, column_of(i), task.cols);
    }
  }
  for (int i = Row::kept; column_of(i) < task.cols; ++i) {
    const auto values = load_chunk<Type, whole>(source, column_of(i), task.cols);
    store_codes<Type>(encoder.encode(values), codes, column_of(i), task.cols);
  }
}

template <typename Type, bool whole, class Row>
void start(const QuantizeRowsTask& task, CudaStream stream) {
  launch(quantize_rows_kernel<Type, whole, Row>,
         grid_for(checked_count(task.rows), kThreads / Row::threads), kThreads, stream, task);
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsTask& task, CudaStream stream) {
  if (task.rows == 0) return;
  with_layout(task.dtype, task.source, task.row_stride, [&](auto type, auto aligned) {
    using Type = decltype(type);
    const auto start_rows = [&](auto row) {
      if (aligned && task.cols % kWidth<Type> == 0) {
        start<Type, true, decltype(row)>(task, stream);
      } else {
        start<Type, false, decltype(row)>(task, stream);
      }
    };
    if (task.cols <= int64_t{ShortRow::threads} * ShortRow::kept * kWidth<Type>) {
      start_rows(ShortRow{});
    } else {
      start_rows(LongRow{});
    }
  });
}

}  // namespace zimage_mxfp8::detail
