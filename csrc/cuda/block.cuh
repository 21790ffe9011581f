// 16 bytes of adjacent elements at a time: loading, encoding to E4M3, decoding, storing.
//
// Compiled without flush-to-zero, and with explicit roundings, so that the bytes equal the CPU's
// (cpu/block.h, which shares none of this code).
#pragma once

#include <cuda_fp8.h>
#include <stdint.h>

#include <type_traits>

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

// Whether every row of a matrix begins at a multiple of 16 bytes; on the host.
inline bool rows_are_aligned(const void* data, int64_t row_stride, size_t item_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         static_cast<size_t>(row_stride) * item_size % 16 == 0;
}

// Calls `function` with the tag type of `dtype` and with std::true_type if every row begins at a
// multiple of 16 bytes, else std::false_type; on the host.
template <typename Function>
void with_layout(DType dtype, const void* data, int64_t row_stride, Function function) {
  const bool aligned = rows_are_aligned(data, row_stride, element_size(dtype));
  with_type(dtype, [&](auto type) {
    if (aligned) {
      function(type, std::true_type{});
    } else {
      function(type, std::false_type{});
    }
  });
}

// Elements that a thread handles at a time: 16 bytes, so that a warp loads and stores contiguous
// memory for every type.
template <typename Type>
constexpr int kWidth = 16 / sizeof(typename Type::Storage);

template <typename Type>
union Elements {
  typename Type::Storage element[kWidth<Type>];
  uint4 vector;
};

// As many E4M3 codes, the first in the lowest byte.
template <typename Type>
union Codes {
  uint32_t word[kWidth<Type> / 4];
  std::conditional_t<kWidth<Type> == 8, uint2, uint32_t> vector;
};

// Loads the elements of a row from `column` on, zeros from `cols` on. With `aligned` the row begins
// at a multiple of 16 bytes; `column` is a multiple of kWidth.
template <typename Type, bool aligned>
__device__ Elements<Type> load(const typename Type::Storage* row, int64_t column, int64_t cols) {
  Elements<Type> loaded;
  if (aligned && column + kWidth<Type> <= cols) {
    loaded.vector = __ldg(reinterpret_cast<const uint4*>(row + column));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<Type>; ++i) {
      loaded.element[i] = column + i < cols ? __ldg(row + column + i) : 0;
    }
  }
  return loaded;
}

// The inverse: stores nothing from `cols` on.
template <typename Type, bool aligned>
__device__ void store(const Elements<Type>& values, typename Type::Storage* row, int64_t column,
                      int64_t cols) {
  typename Type::Storage* target = row + column;
  if (aligned && column + kWidth<Type> <= cols) {
    // An assignment nvcc 13.0 splits, in dequantize_kernel, into four stores of a word each.
    const uint4 words = values.vector;
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<Type>; ++i) {
      if (column + i < cols) target[i] = values.element[i];
    }
  }
}

// Largest magnitude as a float32 bit pattern; these order as integers, NaN above infinity.
template <typename Type>
__device__ uint32_t magnitude(const Elements<Type>& values) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kWidth<Type>; ++i) {
    largest = max(largest, __float_as_uint(Type::widen(values.element[i])) & 0x7FFFFFFF);
  }
  return largest;
}

// Scale byte of a block with the largest magnitude `amax`: ceil(log2(amax / 448)) + 127; 0 below
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

// Codes of elements times `factor`; codes of zeros if `zero`, of NaN if `nan`, for any elements.
template <typename Type>
__device__ Codes<Type> encode(const Elements<Type>& values, float factor, bool zero, bool nan) {
  Codes<Type> codes;
#pragma unroll
  for (int i = 0; i < kWidth<Type> / 4; ++i) {
    uint32_t pairs[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto* pair = values.element + 4 * i + 2 * j;
      const float2 scaled = make_float2(__fmul_rn(Type::widen(pair[0]), factor),
                                        __fmul_rn(Type::widen(pair[1]), factor));
      pairs[j] = __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
    }
    codes.word[i] = pairs[0] | pairs[1] << 16;
    if (zero) codes.word[i] = 0;
    if (nan) codes.word[i] = 0x7F7F7F7F;
  }
  return codes;
}

// The value of two E4M3 codes; NaN codes give some NaN.
__device__ inline float2 decode2(uint16_t codes) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);
  return make_float2(Float16::widen(halves.x), Float16::widen(halves.y));
}

// Decodes codes times 2^(byte - 127), with the CPU's NaN patterns.
template <typename Type>
__device__ Elements<Type> decode(const Codes<Type>& codes, uint32_t byte) {
  Elements<Type> values;
  const float scale = power_of_two(int(byte) - 127);
#pragma unroll
  for (int i = 0; i < kWidth<Type> / 2; ++i) {
    const float2 pair = decode2(codes.word[i / 2] >> 16 * (i % 2));
    values.element[2 * i] = Type::narrow(__fmul_rn(pair.x, scale));
    values.element[2 * i + 1] = Type::narrow(__fmul_rn(pair.y, scale));
  }
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kWidth<Type> / 4; ++i) {
    has_nan |= __vcmpeq4(codes.word[i] & 0x7F7F7F7F, 0x7F7F7F7F) != 0;
  }
  if (has_nan || byte == 255) {
#pragma unroll
    for (int i = 0; i < kWidth<Type>; ++i) {
      const uint32_t code = codes.word[i / 4] >> 8 * (i % 4) & 0xFF;
      if (byte == 255) {
        values.element[i] = Type::narrow(__uint_as_float(kNaNBits));
      } else if ((code & 0x7F) == 0x7F) {
        values.element[i] = Type::narrow(__uint_as_float(kNaNBits | (code & 0x80) << 24));
      }
    }
  }
  return values;
}

}  // namespace zimage_mxfp8::detail
