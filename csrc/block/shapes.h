// Shapes of a block's weights and inputs.
#pragma once

#include "check.h"
#include "zimage_mxfp8/block.h"

namespace zimage_mxfp8::detail {

inline std::int64_t rows_of(const LinearWeights& linear) {
  return std::visit([](const auto& view) { return view.rows; }, linear.weight);
}

inline std::int64_t cols_of(const LinearWeights& linear) {
  return std::visit([](const auto& view) { return view.cols; }, linear.weight);
}

// Checks the shapes and pointers of a block's weights. Throws InvalidArgument.
void check_block(const BlockWeights& block);

// Checks the input of a block of that width, heads and columns of the conditioning (0 without a
// modulation), whose activations have a dtype. Throws InvalidArgument.
void check_block_input(const BlockInput& input, const MatrixView& x, std::int64_t width,
                       std::int64_t conditioning_cols, DType dtype);

}  // namespace zimage_mxfp8::detail
