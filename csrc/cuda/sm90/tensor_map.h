// Tensor maps: descriptions of matrices for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>
#include <stdint.h>

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

}  // namespace zimage_mxfp8::detail
