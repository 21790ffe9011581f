// A row of BF16 in the registers of one thread block, and how it is written as an activation.
//
// Arithmetic names its roundings, so that every instantiation of a kernel has the same bits.
#pragma once

#include <stdint.h>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "fused/arithmetic.cuh"
#include "rotated/encode_row.cuh"
#include "row_scaled/encode_row.cuh"
#include "zimage_mxfp8/fused.h"
#include "zimage_mxfp8/scale_layout.h"

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

// Z-Image's 3840 columns.
using HiddenRow = RowLayout<256, 2>;
// Takes every row.
using WidestRow = RowLayout<512, 4>;
static_assert(WidestRow::kColumns == kMaxFusedColumns);

// Calls `function` with the layout for a row and whether its chunks are whole; on the host.
template <typename Function>
void with_row_layout(int64_t cols, bool whole, Function function) {
  if (!whole) return function(WidestRow{}, std::false_type{});
  if (cols <= HiddenRow::kColumns) return function(HiddenRow{}, std::true_type{});
  return function(WidestRow{}, std::true_type{});
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

// Writes one row, which the block holds rounded, to an activation. `amax` is its largest magnitude
// as a float32 bit pattern; only row-scaled targets need it. Rows from `target.rows` on are padding
// of MXFP8 and hold zeros.
template <typename Layout, bool whole>
__device__ void store_row(const MatrixView& target, int64_t row,
                          const Chunk (&values)[Layout::kChunks], uint32_t) {
  uint16_t* out = static_cast<uint16_t*>(target.data) + row * target.row_stride;
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    store_chunk<whole>(values[i], out, Layout::column(i), int(target.cols));
  }
}

template <typename Layout, bool>
__device__ void store_row(const RowScaledView& target, int64_t row,
                          const Chunk (&values)[Layout::kChunks], uint32_t amax) {
  const RowEncoder encoder(amax);
  if (threadIdx.x == 0) target.scales[row] = encoder.scale();
  uint8_t* codes = target.codes + row * target.cols;
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    if (Layout::column(i) < target.cols) {
      store_codes<BFloat16>(encoder.encode(values[i]), codes, Layout::column(i), target.cols);
    }
  }
}

template <typename Layout, bool>
__device__ void store_row(const MXFP8View& target, int64_t row,
                          const Chunk (&values)[Layout::kChunks], uint32_t) {
  const int64_t code_rows = round_up(target.rows, kBlockSize);
  const int64_t code_cols = round_up(target.cols, kBlockSize);
  const int64_t tiles_per_row = ceil_div(target.cols, 128);
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    const int64_t column = Layout::column(i);
    uint32_t amax = column < target.cols ? magnitude<BFloat16>(values[i]) : 0;
    amax = max(amax, __shfl_xor_sync(~0u, amax, 1));
    amax = max(amax, __shfl_xor_sync(~0u, amax, 2));
    const uint32_t byte = scale_byte(amax);
    if (row < code_rows && column < code_cols) {
      const auto codes =
          encode<BFloat16>(values[i], power_of_two(127 - int(byte == 255 ? 127 : byte)),
                           amax < kTinyBits || column >= target.cols, byte == 255);
      *reinterpret_cast<uint2*>(target.codes + row * code_cols + column) = codes.vector;
    }
    // The four blocks of 128 columns side by side, in each of their 16 lanes.
    uint32_t word = byte << 8 * (threadIdx.x / 4 % 4);
    word |= __shfl_xor_sync(~0u, word, 4);
    word |= __shfl_xor_sync(~0u, word, 8);
    if (threadIdx.x % 16 == 0 && column < tiles_per_row * 128) {
      *reinterpret_cast<uint32_t*>(target.scales +
                                   scale_offset(row, column / kBlockSize, tiles_per_row)) = word;
    }
  }
}

template <typename Layout, bool>
__device__ void store_row(const Int8View& target, int64_t row,
                          const Chunk (&values)[Layout::kChunks], uint32_t) {
  float sums[Layout::kChunks][8], amax = 0.0f;
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[i][e] = BFloat16::widen(values[i].element[e]);
    add_and_subtract_columns(sums[i]);
#pragma unroll
    for (int e = 0; e < 8; ++e) amax = larger_magnitude(amax, sums[i][e]);
  }
  __shared__ uint32_t of_warp[Layout::kWarps];
  const Int8Encoder encoder(block_max(__float_as_uint(amax), of_warp));
  if (threadIdx.x == 0) target.scales[row] = encoder.scale();
  int8_t* codes = target.codes + row * target.cols;
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    if (Layout::column(i) < target.cols) {
      *reinterpret_cast<uint2*>(codes + Layout::column(i)) = encoder.encode(sums[i]);
    }
  }
}

template <typename Target>
inline constexpr bool kIsRowScaled = false;
template <>
inline constexpr bool kIsRowScaled<RowScaledView> = true;

// Blocks that write all rows of an activation, padding included.
inline uint32_t blocks_for(const MatrixView& target) { return checked_count(target.rows); }
inline uint32_t blocks_for(const RowScaledView& target) { return checked_count(target.rows); }
inline uint32_t blocks_for(const Int8View& target) { return checked_count(target.rows); }
inline uint32_t blocks_for(const MXFP8View& target) {
  return checked_count(MXFP8Shape{target.rows, target.cols}.scale_rows());
}

// Writes a row of MXFP8's padding and returns true if `row` is one.
template <typename Layout, typename Target>
__device__ bool store_padding(const Target&, int64_t) {
  return false;
}
template <typename Layout>
__device__ bool store_padding(const MXFP8View& target, int64_t row) {
  if (row < target.rows) return false;
  const Chunk zeros[Layout::kChunks] = {};
  store_row<Layout, true>(target, row, zeros, 0);
  return true;
}

// Whether the rows of a matrix or activation consist of whole chunks.
template <typename View>
bool has_whole_chunks(const View& matrix) {
  return matrix.cols % 8 == 0 &&
         rows_are_aligned(matrix.data, matrix.row_stride, element_size(matrix.dtype));
}
// store_row() needs no whole chunks for codes.
inline bool has_whole_chunks(const MXFP8View&) { return true; }
inline bool has_whole_chunks(const RowScaledView&) { return true; }
inline bool has_whole_chunks(const Int8View&) { return true; }

}  // namespace zimage_mxfp8::detail
