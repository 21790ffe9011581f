// Matrices as Hopper's copy engine knows them.
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace zimage_mxfp8::detail {

// A matrix that is copied in boxes of `box_rows` rows and 128 bytes, which have TMA's swizzle of
// 128 bytes in shared memory; zeros beyond its edges. `item` are the bytes of an element.
CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int64_t item, int64_t rows,
                       int64_t cols, int64_t row_stride, int box_rows);

// The same of BF16.
inline CUtensorMap bf16_map(const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                            int box_rows) {
  return tensor_map(data, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, rows, cols, row_stride, box_rows);
}

}  // namespace zimage_mxfp8::detail
