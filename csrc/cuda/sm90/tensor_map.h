// Tensor maps: descriptions of matrices for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

// Describes a matrix that is copied in boxes of `box_rows` rows and 128 bytes, which have TMA's
// swizzle of 128 bytes in shared memory; elements beyond the matrix's edges are zeros. `item` is
// the size of an element in bytes.
CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int64_t item, int64_t rows,
                       int64_t cols, int64_t row_stride, int box_rows);

// Describes a matrix of BF16.
inline CUtensorMap bf16_map(const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                            int box_rows) {
  return tensor_map(data, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, rows, cols, row_stride, box_rows);
}

// The same of an operand: a matrix of BF16, or one of codes.
inline CUtensorMap operand_map(const ConstMatrixView& matrix, int box_rows) {
  const int64_t row_stride = matrix.rows > 1 ? matrix.row_stride : matrix.cols;
  return bf16_map(matrix.data, matrix.rows, matrix.cols, row_stride, box_rows);
}

inline CUtensorMap operand_map(const ConstRowScaledView& matrix, int box_rows) {
  return tensor_map(matrix.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, matrix.rows, matrix.cols,
                    matrix.cols, box_rows);
}

inline CUtensorMap operand_map(const ConstInt8View& matrix, int box_rows) {
  return tensor_map(matrix.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, matrix.rows, matrix.cols,
                    matrix.cols, box_rows);
}

}  // namespace zimage_mxfp8::detail
