// A row of BF16 in the registers of one thread block.
//
// Arithmetic names its roundings, so that every instantiation of a kernel has the same bits.
#pragma once

#include <stdint.h>

#include "cuda/block.cuh"
#include "fused/arithmetic.cuh"
#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8::detail {

using Chunk = Elements<BFloat16>;

// How a block covers a row: chunk i of a thread begins at column(i). Chunks that begin beyond the
// row hold zeros.
template <int threads, int chunks>
struct RowLayout {
  static constexpr int kThreads = threads;
  static constexpr int kWarps = threads / 32;
  static constexpr int kChunks = chunks;
  static constexpr int64_t kColumns = int64_t{8} * threads * chunks;
  static __device__ int column(int chunk) { return (chunk * threads + int(threadIdx.x)) * 8; }
};

// Rows of up to 4096 columns; Z-Image's have 3840.
using HiddenRow = RowLayout<256, 2>;
// Takes every row.
using WidestRow = RowLayout<512, 4>;
static_assert(WidestRow::kColumns == kMaxFusedColumns);

// Calls `function` with the layout for a row, `Narrow` if it has room, and whether its chunks are
// whole; on the host.
template <typename Narrow = HiddenRow, typename Function>
void with_row_layout(int64_t cols, bool whole, Function function) {
  if (!whole) return function(WidestRow{}, std::false_type{});
  if (cols <= Narrow::kColumns) return function(Narrow{}, std::true_type{});
  return function(WidestRow{}, std::true_type{});
}

__device__ inline const uint16_t* row_of(const ConstMatrixView& matrix, int64_t row) {
  return static_cast<const uint16_t*>(matrix.data) + row * matrix.row_stride;
}

// Loads elements [column, column + 8) of a row, zeros from `cols` on. In a row of `whole` chunks
// the row begins at a multiple of 16 bytes and `cols` is a multiple of 8. Not through __ldg, as
// some rows are written in place.
template <bool whole>
__device__ Chunk load_chunk(const uint16_t* row, int column, int cols) {
  Chunk chunk;
  if constexpr (whole) {
    chunk.vector = make_uint4(0, 0, 0, 0);
    if (column < cols) chunk.vector = *reinterpret_cast<const uint4*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk.element[i] = column + i < cols ? row[column + i] : 0;
  }
  return chunk;
}

template <bool whole>
__device__ void store_chunk(const Chunk& chunk, uint16_t* row, int column, int cols) {
  if constexpr (whole) {
    // The compiler splits some assignments of 16 bytes.
    const uint4 value = chunk.vector;
    if (column < cols) {
      asm volatile(
          "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(row + column)),
          "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
          : "memory");
    }
  } else {
    store<BFloat16, false>(chunk, row, column, cols);
  }
}

template <typename Layout, bool whole>
__device__ void load_row(Chunk (&values)[Layout::kChunks], const uint16_t* row, int cols) {
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    values[i] = load_chunk<whole>(row, Layout::column(i), cols);
  }
}

__device__ inline Chunk round8(const float (&values)[8]) {
  Chunk rounded;
  rounded.vector = {round2(values[0], values[1]), round2(values[2], values[3]),
                    round2(values[4], values[5]), round2(values[6], values[7])};
  return rounded;
}

// Whether the rows of a matrix or activation consist of whole chunks.
template <typename View>
bool has_whole_chunks(const View& matrix) {
  return matrix.cols % 8 == 0 &&
         rows_are_aligned(matrix.data, matrix.row_stride, element_size(matrix.dtype));
}

}  // namespace zimage_mxfp8::detail
