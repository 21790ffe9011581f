// How a thread block writes a row as an activation: in BF16, or encoded in one of the 8-bit
// formats.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "fused/row.cuh"
#include "rotated/encode_row.cuh"
#include "row_scaled/encode_row.cuh"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail {

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

// store_row() needs no whole chunks for codes.
inline bool has_whole_chunks(const MXFP8View&) { return true; }
inline bool has_whole_chunks(const RowScaledView&) { return true; }
inline bool has_whole_chunks(const Int8View&) { return true; }

}  // namespace zimage_mxfp8::detail
