#include "zimage_mxfp8/scale_layout.h"

#include <cstring>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {
namespace {

void check(const std::uint8_t* a, const std::uint8_t* b, std::int64_t rows, std::int64_t cols) {
  if (rows < 0 || cols < 0) throw InvalidArgument("rows and cols must not be negative");
  if ((!a || !b) && rows > 0 && cols > 0)
    throw InvalidArgument("row_major or blocked is a null pointer");
}

}  // namespace

void to_blocked(const std::uint8_t* row_major, std::int64_t rows, std::int64_t cols,
                std::uint8_t* blocked) {
  check(row_major, blocked, rows, cols);
  const std::int64_t tiles = ceil_div(cols, 4);
  if (rows > 0 && cols > 0) {
    std::memset(blocked, 0, static_cast<std::size_t>(round_up(rows, 128) * tiles * 4));
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      blocked[scale_offset(row, col, tiles)] = row_major[row * cols + col];
    }
  }
}

void from_blocked(const std::uint8_t* blocked, std::int64_t rows, std::int64_t cols,
                  std::uint8_t* row_major) {
  check(blocked, row_major, rows, cols);
  const std::int64_t tiles = ceil_div(cols, 4);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      row_major[row * cols + col] = blocked[scale_offset(row, col, tiles)];
    }
  }
}

}  // namespace zimage_mxfp8
