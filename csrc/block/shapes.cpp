#include "block/shapes.h"

#include <string>
#include <variant>

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

void check_linear(const LinearWeights& linear, const char* what, std::int64_t rows,
                  std::int64_t cols) {
  if (const auto* const plain = std::get_if<ConstMatrixView>(&linear.weight)) {
    check_matrix(*plain, what);
  } else {
    const auto& mxfp8 = std::get<ConstMXFP8View>(linear.weight);
    if (!mxfp8.codes || !mxfp8.scales) {
      throw InvalidArgument("the codes or the scales of " + std::string(what) +
                            " are a null pointer");
    }
  }
  if (rows_of(linear) != rows || cols_of(linear) != cols) {
    throw InvalidArgument(std::string(what) + " must be " + shape_text(rows, cols) + ", not " +
                          shape_text(rows_of(linear), cols_of(linear)));
  }
}

void check_vector(const ConstMatrixView& vector, const char* what, std::int64_t size) {
  check(vector, what, 1, size, vector.dtype);
}

}  // namespace

void check_block(const BlockWeights& block) {
  const std::int64_t width = block.width, hidden = rows_of(block.w1);
  if (width < 1 || width % kHeadSize != 0 || block.heads != width / kHeadSize) {
    throw InvalidArgument("a block of width " + std::to_string(width) + " cannot have " +
                          std::to_string(block.heads) + " heads of " + std::to_string(kHeadSize));
  }
  check_linear(block.qkv, "qkv", 3 * width, width);
  check_linear(block.out, "out", width, width);
  check_linear(block.w1, "w1", hidden, width);
  check_linear(block.w3, "w3", hidden, width);
  check_linear(block.w2, "w2", width, hidden);
  if (block.modulation) {
    const LinearWeights& linear = block.modulation->linear;
    check_linear(linear, "the modulation", 4 * width, cols_of(linear));
    check_vector(block.modulation->bias, "the bias of the modulation", 4 * width);
  }
  check_vector(block.attention_norm1, "attention_norm1", width);
  check_vector(block.attention_norm2, "attention_norm2", width);
  check_vector(block.ffn_norm1, "ffn_norm1", width);
  check_vector(block.ffn_norm2, "ffn_norm2", width);
  check_vector(block.q_norm, "q_norm", kHeadSize);
  check_vector(block.k_norm, "k_norm", kHeadSize);
}

void check_block_input(const BlockInput& input, const MatrixView& x, std::int64_t width,
                       std::int64_t conditioning_cols, DType dtype) {
  check({x.data, x.dtype, x.rows, x.cols, x.row_stride}, "x", x.rows, width, dtype);
  check(input.rotations, "rotations", x.rows, kHeadSize, DType::kFloat32);
  check_lengths(input.lengths, x.rows, "x");
  if (conditioning_cols == 0) return;
  if (!input.conditioning) throw InvalidArgument("a block with a modulation needs a conditioning");
  check(*input.conditioning, "conditioning", static_cast<std::int64_t>(input.lengths.size()),
        conditioning_cols, dtype);
}

}  // namespace zimage_mxfp8::detail
