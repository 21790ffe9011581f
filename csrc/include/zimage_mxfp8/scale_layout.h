// The 128x4 blocked layout of block scales that Blackwell's tensor cores read (cuBLAS documents it
// as "1D block scaling factors layout"; PyTorch calls it SWIZZLE_32_4_4).
#pragma once

#include <cstdint>

namespace zimage_mxfp8 {

// Byte offset of the scale of row `row`, block `block`, where `tiles_per_row` is
// ceil(blocks of a row / 4). Tiles of 128 rows x 4 blocks are 512 bytes each, in row-major order.
constexpr std::int64_t scale_offset(std::int64_t row, std::int64_t block,
                                    std::int64_t tiles_per_row) {
  return ((row / 128) * tiles_per_row + block / 4) * 512 + (row % 32) * 16 +
         ((row % 128) / 32) * 4 + block % 4;
}

// Row-major [rows, cols] -> blocked [round_up(rows, 128), round_up(cols, 4)], padding 0.
// Both belong to the caller and must not overlap. Throws InvalidArgument for null pointers or
// negative sizes.
void to_blocked(const std::uint8_t* row_major, std::int64_t rows, std::int64_t cols,
                std::uint8_t* blocked);

// The inverse; reads round_up(rows, 128) * round_up(cols, 4) bytes, writes rows * cols. Throws as
// to_blocked does.
void from_blocked(const std::uint8_t* blocked, std::int64_t rows, std::int64_t cols,
                  std::uint8_t* row_major);

}  // namespace zimage_mxfp8
