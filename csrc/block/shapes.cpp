#include "block/shapes.h"

#include <string>

#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

void check(const ConstMatrixView& matrix, const char* what, std::int64_t rows, std::int64_t cols,
           DType dtype) {
  check_matrix(matrix, what);
  if (matrix.rows != rows || matrix.cols != cols) {
    throw InvalidArgument(std::string(what) + " must be " + shape_text(rows, cols) + ", not " +
                          shape_text(matrix.rows, matrix.cols));
  }
  if (matrix.dtype != dtype) {
    throw InvalidArgument(std::string(what) + " must be " +
                          (dtype == DType::kFloat32 ? "float32" : "bfloat16"));
  }
}

}  // namespace

void check_block_input(const BlockInput& input, const MatrixView& x, std::int64_t width,
                       std::int64_t conditioning_cols, DType dtype) {
  check({x.data, x.dtype, x.rows, x.cols, x.row_stride}, "x", x.rows, width, dtype);
  check(input.rotations, "rotations", x.rows, kHeadSize, DType::kFloat32);
  std::int64_t tokens = 0;
  for (const std::int64_t length : input.lengths) {
    if (length < 0 || length > x.rows - tokens) {
      throw InvalidArgument("lengths must be 0 or more, and the rows of x together");
    }
    tokens += length;
  }
  if (tokens != x.rows) {
    throw InvalidArgument("lengths are " + std::to_string(tokens) + " tokens, but x has " +
                          std::to_string(x.rows) + " rows");
  }
  if (conditioning_cols == 0) return;
  if (!input.conditioning) throw InvalidArgument("a block with a modulation needs a conditioning");
  check(*input.conditioning, "conditioning", static_cast<std::int64_t>(input.lengths.size()),
        conditioning_cols, dtype);
}

}  // namespace zimage_mxfp8::detail
