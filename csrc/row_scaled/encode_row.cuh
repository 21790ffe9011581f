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
  __device__ Codes<Type> encode(const Elements<Type>& values) const {
    return detail::encode<Type>(values, factor_, zero_, !finite_);
  }

 private:
  float maximum_, factor_;
  bool finite_, zero_;
};

// Stores those codes that are in columns below `cols`. The matrix of codes has no gaps between its
// rows and is aligned to 16 bytes.
template <typename Type>
__device__ void store_codes(const Codes<Type>& codes, uint8_t* row, int64_t column, int64_t cols) {
  if (column + kWidth<Type> <= cols && cols % kWidth<Type> == 0) {
    *reinterpret_cast<decltype(codes.vector)*>(row + column) = codes.vector;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<Type>; ++i) {
      if (column + i < cols) row[column + i] = codes.word[i / 4] >> 8 * (i % 4);
    }
  }
}

}  // namespace zimage_mxfp8::detail
