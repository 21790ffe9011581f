#include "cpu/block.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

namespace {

// Blocks that are encoded together. Maxima first, then codes, keeps each loop free of branches.
constexpr int kStrip = 16;

// Encodes `count` elements from `column` on; returns whether all are finite.
template <typename Type>
bool encode_strip(const void* row, int64_t column, int64_t count, uint8_t* codes,
                  uint8_t (&bytes)[kStrip]) {
  typename Type::Storage raw[kStrip * kBlock];
  load_raw<Type>(row, column, count, raw);
  const int blocks = static_cast<int>(ceil_div(count, kBlock));
  int32_t amax[kStrip];
  int32_t lowest = kInfinityBits, highest = 0;
  for (int b = 0; b < blocks; ++b) {
    amax[b] = block_maximum<Type>(raw + b * kBlock);
    lowest = amax[b] < lowest ? amax[b] : lowest;
    highest = amax[b] > highest ? amax[b] : highest;
  }
  const bool finite = highest < kInfinityBits;
  if (finite && lowest >= kTinyBits && scale_byte(lowest) >= kSafeByte) {
    for (int b = 0; b < blocks; ++b) {
      const int byte = scale_byte(amax[b]);
      encode_block<Type>(raw + b * kBlock, byte, codes + b * kBlock);
      bytes[b] = static_cast<uint8_t>(byte);
    }
  } else {
    for (int b = 0; b < blocks; ++b) {
      bytes[b] = encode_any_block<Type>(raw + b * kBlock, amax[b], codes + b * kBlock);
    }
  }
  return finite;
}

}  // namespace

bool quantize_tile(const QuantizeTask& task, int64_t row_begin, int64_t row_end) {
  return with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    const int64_t blocks = ceil_div(task.cols, kBlock);
    const int64_t tiles = ceil_div(blocks, 4);
    // The scales of a tile row are contiguous; this clears its padding.
    memset(task.scales + (row_begin / 128) * tiles * 512, 0, static_cast<size_t>(tiles) * 512);
    bool finite = true;
    for (int64_t row = row_begin; row < row_end; ++row) {
      uint8_t* codes = task.codes + row * blocks * kBlock;
      if (row >= task.rows) {
        memset(codes, 0, static_cast<size_t>(blocks) * kBlock);
        continue;
      }
      const char* source =
          static_cast<const char*>(task.source) +
          row * task.row_stride * static_cast<int64_t>(sizeof(typename Type::Storage));
      for (int64_t block = 0; block < blocks; block += kStrip) {
        const int64_t column = block * kBlock;
        const int64_t left = task.cols - column, most = kStrip * kBlock;
        uint8_t bytes[kStrip];
        finite &=
            encode_strip<Type>(source, column, left < most ? left : most, codes + column, bytes);
        for (int64_t b = block; b < blocks && b < block + kStrip; ++b) {
          task.scales[scale_offset(row, b, tiles)] = bytes[b - block];
        }
      }
    }
    return !finite;
  });
}

bool row_is_finite(const void* row, DType dtype, int64_t count) {
  return with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t column = 0; column < count; column += kBlock) {
      const int64_t left = count - column;
      typename Type::Storage raw[kBlock];
      load_raw<Type>(row, column, left < kBlock ? left : kBlock, raw);
      if (block_maximum<Type>(raw) >= kInfinityBits) return false;
    }
    return true;
  });
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
