// How the elements of a row become E4M3 codes with one scale (see quantize_rows in row_scaled.h).
#pragma once

#include <stdint.h>

#include "cuda/block.cuh"
#include "tasks.h"

namespace zimage_mxfp8::detail {

class RowEncoder {
 public:
  // `amax` is the row's largest magnitude as a float32 bit pattern.
  explicit __device__ RowEncoder(uint32_t amax) {
    maximum_ = __uint_as_float(amax);
    factor_ = __fdiv_rn(448.0f, maximum_);
    finite_ = amax < kInfinityBits;
    zero_ = finite_ && maximum_ < kSmallestRowMaximum;
  }

  __device__ float scale() const {
    if (!finite_) return __uint_as_float(kNaNBits);
    return zero_ ? 0.0f : __fdiv_rn(maximum_, 448.0f);
  }

  template <typename Type>
  __device__ uint2 encode(const Elements8<Type>& values) const {
    if (!finite_) return make_uint2(0x7F7F7F7F, 0x7F7F7F7F);
    if (zero_) return make_uint2(0, 0);
    return encode8<Type>(values, factor_);
  }

 private:
  float maximum_, factor_;
  bool finite_, zero_;
};

// Stores those codes of eight columns that are below `cols`. The matrix of codes has no gaps
// between its rows and is aligned to 16 bytes.
__device__ inline void store_codes8(uint2 encoded, uint8_t* row, int64_t column, int64_t cols) {
  if (column + 8 <= cols && cols % 8 == 0) {
    *reinterpret_cast<uint2*>(row + column) = encoded;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < cols) row[column + i] = (i < 4 ? encoded.x : encoded.y) >> 8 * (i % 4);
    }
  }
}

}  // namespace zimage_mxfp8::detail
