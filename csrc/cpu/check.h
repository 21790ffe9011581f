// Argument checks that the operations share.
#pragma once

#include <cstdint>
#include <string>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

inline std::string shape_text(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

template <typename View>
void check_matrix(const View& matrix, const char* what) {
  if (matrix.rows < 0 || matrix.cols < 0) {
    throw InvalidArgument(std::string(what) + " has a negative size " +
                          shape_text(matrix.rows, matrix.cols));
  }
  if (matrix.rows > 1 && matrix.row_stride < matrix.cols) {
    throw InvalidArgument(std::string(what) + " has rows that overlap: row stride " +
                          std::to_string(matrix.row_stride) + " for " +
                          std::to_string(matrix.cols) + " columns");
  }
  if (!matrix.data && matrix.rows > 0 && matrix.cols > 0) {
    throw InvalidArgument(std::string(what) + " is a null pointer");
  }
}

template <typename Plain, typename MXFP8>
void check_pair(const Plain& plain, const MXFP8& mxfp8, const char* what) {
  check_matrix(plain, what);
  if (plain.rows != mxfp8.rows || plain.cols != mxfp8.cols) {
    throw InvalidArgument(std::string(what) + " is " + shape_text(plain.rows, plain.cols) +
                          " but the MXFP8 matrix is " + shape_text(mxfp8.rows, mxfp8.cols));
  }
  if ((!mxfp8.codes || !mxfp8.scales) && plain.rows > 0 && plain.cols > 0) {
    throw InvalidArgument("the codes or the scales of the MXFP8 matrix are a null pointer");
  }
}

// Rows that make a range worth a thread of its own (about 50 us of work).
inline std::int64_t row_grain(std::int64_t cols) { return 65536 / (cols > 0 ? cols : 1) + 1; }

}  // namespace zimage_mxfp8::detail
