// Eight adjacent elements at a time: loading as float32, encoding to E4M3, decoding, storing.
//
// Compiled without flush-to-zero, and with explicit roundings, so that the bytes equal the CPU's
// (cpu/block.h, which shares none of this code).
#pragma once

#include <cuda_fp8.h>
#include <stdint.h>

#include "tasks.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr uint32_t kNaNBits = 0x7FC00000;
// 448 * 2^-127 as float32: below it the scale byte would be negative.
constexpr uint32_t kTinyBits = (8u << 23) | 0x600000;

struct BFloat16 {
  using Storage = uint16_t;
  static __device__ float widen(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }
  static __device__ uint16_t narrow(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFF) > kInfinityBits) return (bits >> 16) | 0x40;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  }
};

struct Float16 {
  using Storage = uint16_t;
  static __device__ float widen(uint16_t x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
  }
  static __device__ uint16_t narrow(float x) {
    if (isnan(x)) return 0x7E00 | (__float_as_uint(x) >> 16 & 0x8000);
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
  }
};

struct Float32 {
  using Storage = uint32_t;
  static __device__ float widen(uint32_t x) { return __uint_as_float(x); }
  static __device__ uint32_t narrow(float x) { return __float_as_uint(x); }
};

// Calls `function` with the tag type of `dtype`, on the host.
template <typename Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
    case DType::kFloat32:
      return function(Float32{});
  }
}

// Eight elements in memory.
template <typename Type>
union Elements8 {
  typename Type::Storage element[8];
  uint4 vector[sizeof(typename Type::Storage) / 2];
};

// Loads elements [column, column + 8) of a row, zeros from `cols` on. With `aligned` the row
// begins at a multiple of 16 bytes.
template <typename Type, bool aligned>
__device__ Elements8<Type> load8(const typename Type::Storage* row, int64_t column, int64_t cols) {
  Elements8<Type> loaded;
  if (aligned && column + 8 <= cols) {
#pragma unroll
    for (int i = 0; i < int(sizeof(loaded) / 16); ++i) {
      loaded.vector[i] = __ldg(reinterpret_cast<const uint4*>(row + column) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) loaded.element[i] = column + i < cols ? __ldg(row + column + i) : 0;
  }
  return loaded;
}

template <typename Type, bool aligned>
__device__ void store8(const Elements8<Type>& values, typename Type::Storage* row, int64_t column,
                       int64_t cols) {
  if (aligned && column + 8 <= cols) {
#pragma unroll
    for (int i = 0; i < int(sizeof(values) / 16); ++i) {
      reinterpret_cast<uint4*>(row + column)[i] = values.vector[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < cols) row[column + i] = values.element[i];
    }
  }
}

// The same where the lanes of a pair (2i, 2i + 1) hold the halves of 16 elements that begin at a
// multiple of 16. Float32 is exchanged, so that a store writes whole sectors of 32 bytes.
template <typename Type, bool aligned>
__device__ void store8_of_pair(const Elements8<Type>& values, typename Type::Storage* row,
                               int64_t column, int64_t cols) {
  const int64_t begin = column & ~int64_t{15};
  if (sizeof(values) == 16 || !aligned || begin + 16 > cols) {
    return store8<Type, aligned>(values, row, column, cols);
  }
  const bool odd = column != begin;
  const uint4 given = values.vector[odd ? 0 : sizeof(values) / 16 - 1];
  const unsigned pair = 3u << (threadIdx.x % 32 & ~1);
  const uint4 taken = {__shfl_xor_sync(pair, given.x, 1), __shfl_xor_sync(pair, given.y, 1),
                       __shfl_xor_sync(pair, given.z, 1), __shfl_xor_sync(pair, given.w, 1)};
  // The even lane has the first quarter and gets the third, the odd one the fourth and the second.
  uint4* target = reinterpret_cast<uint4*>(row + begin);
  target[odd ? 1 : 0] = odd ? taken : values.vector[0];
  target[odd ? 3 : 2] = odd ? values.vector[sizeof(values) / 16 - 1] : taken;
}

// Largest magnitude as a float32 bit pattern; these order as integers, NaN above infinity.
template <typename Type>
__device__ uint32_t magnitude8(const Elements8<Type>& values) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    largest = max(largest, __float_as_uint(Type::widen(values.element[i])) & 0x7FFFFFFF);
  }
  return largest;
}

// Scale byte of a block whose largest magnitude is `amax`: ceil(log2(amax / 448)) + 127; 0 below
// 448 * 2^-127, 255 for infinity and NaN. amax = m * 2^e needs 2^(e - 8) if m <= 1.75
// (448 = 1.75 * 2^8), else 2^(e - 7).
__device__ inline uint32_t scale_byte(uint32_t amax) {
  if (amax < kTinyBits) return 0;
  if (amax >= kInfinityBits) return 255;
  return (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000);
}

// 2^exponent for exponents from -127 (a float32 denormal) to 127.
__device__ inline float power_of_two(int exponent) {
  return __uint_as_float(exponent == -127 ? 0x400000u : uint32_t(exponent + 127) << 23);
}

// Codes of eight elements, the first in the lowest byte, each times `factor`.
template <typename Type>
__device__ uint2 encode8(const Elements8<Type>& values, float factor) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 scaled = make_float2(__fmul_rn(Type::widen(values.element[2 * i]), factor),
                                      __fmul_rn(Type::widen(values.element[2 * i + 1]), factor));
    pairs[i] = __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// The value of two E4M3 codes; NaN codes give some NaN.
__device__ inline float2 decode2(uint16_t codes) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);
  return make_float2(Float16::widen(halves.x), Float16::widen(halves.y));
}

// Decodes eight codes times 2^(byte - 127), with the CPU's NaN patterns.
template <typename Type>
__device__ Elements8<Type> decode8(uint2 codes, uint32_t byte) {
  Elements8<Type> values;
  const float scale = power_of_two(int(byte) - 127);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = decode2((i < 2 ? codes.x : codes.y) >> 16 * (i % 2));
    values.element[2 * i] = Type::narrow(__fmul_rn(pair.x, scale));
    values.element[2 * i + 1] = Type::narrow(__fmul_rn(pair.y, scale));
  }
  const bool has_nan = (__vcmpeq4(codes.x & 0x7F7F7F7F, 0x7F7F7F7F) |
                        __vcmpeq4(codes.y & 0x7F7F7F7F, 0x7F7F7F7F)) != 0;
  if (has_nan || byte == 255) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t code = (i < 4 ? codes.x : codes.y) >> 8 * (i % 4) & 0xFF;
      if (byte == 255) {
        values.element[i] = Type::narrow(__uint_as_float(kNaNBits));
      } else if ((code & 0x7F) == 0x7F) {
        values.element[i] = Type::narrow(__uint_as_float(kNaNBits | (code & 0x80) << 24));
      }
    }
  }
  return values;
}

// How a warp covers one 128x4 tile of scales: in 16 steps, each of rows r and r + 1 and those 32,
// 64 and 96 below, 128 columns wide. A lane holds 8 elements of 4 rows, 16 lanes hold the 16
// blocks whose scales are adjacent in the blocked layout.
struct TileStep {
  int64_t row;           // the lane's first row; the others are 32, 64 and 96 below
  int64_t column;        // the lane's first column
  int64_t scale_offset;  // of the 16 scales
};

// Warps that a matrix needs.
inline int64_t tile_steps(int64_t rows, int64_t cols) {
  return ceil_div(rows, 128) * 16 * ceil_div(cols, 128);
}

__device__ inline TileStep tile_step(uint32_t step, uint32_t tiles_per_row, int lane) {
  const uint32_t tile = step % tiles_per_row, pair = step / tiles_per_row;
  const int64_t tile_row = pair / 16;
  const int row = int(pair % 16) * 2 + lane / 16;
  return {tile_row * 128 + row, int64_t(tile) * 128 + lane % 16 * 8,
          (tile_row * tiles_per_row + tile) * 512 + row * 16};
}

}  // namespace zimage_mxfp8::detail
