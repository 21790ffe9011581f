// Arithmetic of the fused kernels on single elements. It names its roundings, so that every
// instantiation of a kernel has the same bits.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

namespace zimage_mxfp8::detail {

__device__ inline float silu(float x) { return __fdividef(x, __fadd_rn(1.0f, __expf(-x))); }

// The product of two complex numbers; the second is (cosine, sine).
__device__ inline float2 rotate(float2 pair, float2 rotation) {
  return {__fmaf_rn(pair.x, rotation.x, -__fmul_rn(pair.y, rotation.y)),
          __fmaf_rn(pair.x, rotation.y, __fmul_rn(pair.y, rotation.x))};
}

// Two BF16 in a word, the first one low.
__device__ inline uint32_t round2(float low, float high) {
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(low, high);
  return pair.x | uint32_t{pair.y} << 16;
}

}  // namespace zimage_mxfp8::detail
