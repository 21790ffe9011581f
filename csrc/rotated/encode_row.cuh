// How the elements of a row are rotated and become INT8 codes with one scale (see rotated.h).
#pragma once

#include <stdint.h>

#include "cuda/block.cuh"
#include "tasks.h"

namespace zimage_mxfp8::detail {

// Multiplies 32 columns, of which four adjacent lanes hold eight each, by Sylvester's Hadamard
// matrix. All lanes of a warp take part.
__device__ inline void add_and_subtract_columns(float (&values)[8]) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & step) continue;
      const float low = values[i], high = values[i + step];
      values[i] = __fadd_rn(low, high);
      values[i + step] = __fsub_rn(low, high);
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = __fmaf_rn(values[i], sign, __shfl_xor_sync(~0u, values[i], lanes));
    }
  }
}

// The larger magnitude, NaN if one is NaN.
__device__ inline float larger_magnitude(float magnitude, float value) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(magnitude), "f"(fabsf(value)));
  return result;
}

class Int8Encoder {
 public:
  // `amax` is the largest magnitude of a row's sums as a float32 bit pattern.
  explicit __device__ Int8Encoder(uint32_t amax) {
    maximum_ = __uint_as_float(amax);
    finite_ = amax < kInfinityBits;
    is_zero_ = !finite_ || maximum_ < kSmallestRowMaximum;
    factor_ = __fdiv_rn(127.0f, maximum_);
  }

  __device__ float scale() const {
    if (!finite_) return __uint_as_float(kNaNBits);
    constexpr float of_rotation = 0.17677669529663687f;  // 1 / sqrt(32)
    return is_zero_ ? 0.0f : __fmul_rn(__fdiv_rn(maximum_, 127.0f), of_rotation);
  }

  // Codes of eight sums, the first in the lowest byte. The largest magnitude becomes 127: its
  // product with the factor is off by a unit in the last place.
  __device__ uint2 encode(const float (&sums)[8]) const {
    return {is_zero_ ? 0 : encode4(sums), is_zero_ ? 0 : encode4(sums + 4)};
  }

 private:
  __device__ uint32_t encode4(const float* sums) const {
    // The sum with this number has the nearest integer in its lowest bits.
    constexpr float kInteger = 0x1.8p23f;
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fmaf_rn(sums[i], factor_, kInteger));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                       0x5410);
  }

  float maximum_, factor_;
  bool finite_, is_zero_;
};

}  // namespace zimage_mxfp8::detail
