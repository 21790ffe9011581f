// Blocks of 32 elements: loading as float32 bit patterns, E4M3 encoding and decoding, storing.
// Included by the kernel sources only; everything is local to the including file (see kernels.h
// for why). Plain loops of fixed length that compilers turn into vector code.
//
// Nothing here depends on the caller's flush-to-zero mode: wherever a float32 denormal could
// matter (scale bytes below kSafeByte), integers do the work.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "zimage_mxfp8/matrix.h"

#if defined(_MSC_VER) && !defined(__clang__)
#pragma fp_contract(off)  // see csrc/CMakeLists.txt
#endif

namespace {

using zimage_mxfp8::DType;

constexpr int kBlock = 32;
constexpr int32_t kInfinityBits = 0x7F800000;
// 448 * 2^-127 as float32: below it the scale byte would be negative.
constexpr int32_t kTinyBits = (8 << 23) | 0x600000;
// From this scale byte on, float32 denormals round to zero when encoded, and decoded values are
// float32 normals.
constexpr int kSafeByte = 16;

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// ---- element types <-> float32 bit patterns

struct BFloat16 {
  using Storage = uint16_t;
  using Magnitude = int16_t;
  static uint32_t widen(uint16_t x) { return static_cast<uint32_t>(x) << 16; }
  static uint16_t narrow(uint32_t bits) {
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;
  using Magnitude = int16_t;
  static uint32_t widen(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t magnitude = x & 0x7FFF;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    // 2^-14 (1 + m) - 2^-14 yields subnormals without touching a float32 denormal.
    const uint32_t subnormal =
        as_bits(as_float((magnitude << 13) + (113u << 23)) - as_float(113u << 23));
    const uint32_t special = (magnitude << 13) | 0x7F800000;
    uint32_t bits = magnitude < 0x400 ? subnormal : normal;
    bits = magnitude >= 0x7C00 ? special : bits;
    return bits | sign;
  }
  static uint16_t narrow(uint32_t bits) {
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    const uint32_t normal = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
    // Adding 0.5 leaves a multiple of 2^-24, float16's subnormal step, in the low bits.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - (126u << 23);
    const uint32_t nan = 0x7E00 | ((magnitude >> 13) & 0x3FF);
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477FF000 ? 0x7C00 : half;  // from 65520 on: infinity
    half = magnitude > 0x7F800000 ? nan : half;
    return static_cast<uint16_t>(half | sign);
  }
};

struct Float32 {
  using Storage = uint32_t;
  using Magnitude = int32_t;
  static uint32_t widen(uint32_t x) { return x; }
  static uint32_t narrow(uint32_t bits) { return bits; }
};

// Calls `function` with the tag type of `dtype`.
template <typename Function>
inline auto with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
    default:
      return function(Float32{});
  }
}

// Copies `count` <= `capacity` elements, the rest being zero.
template <typename Type, int capacity>
inline void load_raw(const void* row, int64_t column, int64_t count,
                     typename Type::Storage (&raw)[capacity]) {
  const char* begin = static_cast<const char*>(row) + column * sizeof(raw[0]);
  if (count == capacity) {
    memcpy(raw, begin, sizeof(raw));
  } else {
    memset(raw, 0, sizeof(raw));
    memcpy(raw, begin, static_cast<size_t>(count) * sizeof(raw[0]));
  }
}

// Loads `count` <= 32 elements as float32 bit patterns, the rest of the block being zero.
template <typename Type>
inline void load_block(const void* row, int64_t column, int64_t count, uint32_t (&bits)[kBlock]) {
  typename Type::Storage raw[kBlock];
  load_raw<Type>(row, column, count, raw);
  for (int i = 0; i < kBlock; ++i) bits[i] = Type::widen(raw[i]);
}

template <typename Type>
inline void store_block(const uint32_t (&bits)[kBlock], void* row, int64_t column, int64_t count) {
  typename Type::Storage raw[kBlock];
  for (int i = 0; i < kBlock; ++i) raw[i] = Type::narrow(bits[i]);
  char* begin = static_cast<char*>(row) + column * sizeof(raw[0]);
  if (count == kBlock) {
    memcpy(begin, raw, sizeof(raw));
  } else {
    memcpy(begin, raw, static_cast<size_t>(count) * sizeof(raw[0]));
  }
}

// ---- MXFP8

// E4M3 code of |x| * 2^(127 - byte) for any float32 |x| that the scale brings to 448 or less.
inline uint8_t encode_exactly(uint32_t magnitude, int byte) {
  if (magnitude == 0) return 0;
  const int field = static_cast<int>(magnitude >> 23);
  int64_t significand = magnitude & 0x7FFFFF;
  int exponent = field - 150;  // |x| = significand * 2^exponent
  if (field == 0) {
    exponent = -149;
  } else {
    significand |= 0x800000;
  }
  exponent += 127 - byte;
  int top = exponent;  // floor(log2 of the scaled value)
  for (int64_t s = significand; s > 1; s >>= 1) ++top;
  const int step = top < -6 ? -9 : top - 3;  // E4M3's spacing there
  const int shift = step - exponent;
  int64_t units;
  if (shift <= 0) {
    units = significand << -shift;
  } else if (shift > 40) {
    units = 0;
  } else {
    const int64_t half = int64_t{1} << (shift - 1);
    units = significand >> shift;
    const int64_t rest = significand - (units << shift);
    if (rest > half || (rest == half && (units & 1))) ++units;
  }
  // For normals `units` is 8..16, and 16 carries into the exponent as it should.
  return static_cast<uint8_t>(top < -6 ? units : ((top + 7) << 3) + (units - 8));
}

// Largest magnitude of a block as a float32 bit pattern.
template <typename Type>
inline int32_t block_maximum(const typename Type::Storage* raw) {
  // Sign-and-magnitude formats order like integers, so the narrow types need no widening.
  using Magnitude = typename Type::Magnitude;
  constexpr Magnitude sign_free =
      static_cast<Magnitude>(~Magnitude{0} ^ (Magnitude{1} << (8 * sizeof(Magnitude) - 1)));
  Magnitude maximum = 0;
  for (int i = 0; i < kBlock; ++i) {
    const Magnitude magnitude = static_cast<Magnitude>(raw[i]) & sign_free;
    maximum = magnitude > maximum ? magnitude : maximum;
  }
  return static_cast<int32_t>(Type::widen(static_cast<typename Type::Storage>(maximum)));
}

// Scale byte of a block with a finite largest magnitude `amax` of at least 448 * 2^-127:
// amax = m * 2^e needs 2^(e - 8) if m <= 1.75 (448 = 1.75 * 2^8), else 2^(e - 7).
inline int scale_byte(int32_t amax) {
  return (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000 ? 1 : 0);
}

// Codes of a block times `factor`, which brings every magnitude to 464 or less (what rounds to
// 448).
template <typename Type>
inline void encode_scaled(const typename Type::Storage* raw, float factor, uint8_t* codes) {
  uint8_t encoded[kBlock];  // local: a byte pointer may alias anything, which stops vectorisation
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t bits = Type::widen(raw[i]);
    const float scaled = as_float(bits & 0x7FFFFFFF) * factor;
    const uint32_t y = as_bits(scaled);
    // Normal: keep 3 mantissa bits, exponent bias 127 -> 7. Subnormal: adding 2^14 leaves a
    // multiple of 2^-9 in the low bits. Both round to nearest even.
    const uint32_t normal = ((y + 0x7FFFF + ((y >> 20) & 1)) >> 20) - (120u << 3);
    const uint32_t subnormal = as_bits(scaled + 16384.0f) - (141u << 23);
    const uint32_t code = y < (121u << 23) ? subnormal : normal;
    encoded[i] = static_cast<uint8_t>(code | ((bits >> 24) & 0x80));
  }
  memcpy(codes, encoded, kBlock);
}

// Codes of a block with a scale byte of kSafeByte or more.
template <typename Type>
inline void encode_block(const typename Type::Storage* raw, int byte, uint8_t* codes) {
  encode_scaled<Type>(raw, as_float(static_cast<uint32_t>(254 - byte) << 23), codes);
}

// Codes and scale byte of any block. One with a NaN or an infinity becomes all NaN (scale byte
// 255, codes 0x7F).
template <typename Type>
inline uint8_t encode_any_block(const typename Type::Storage* raw, int32_t amax, uint8_t* codes) {
  if (amax < kTinyBits) {
    memset(codes, 0, kBlock);
    return 0;
  }
  if (amax >= kInfinityBits) {
    memset(codes, 0x7F, kBlock);
    return 255;
  }
  const int byte = scale_byte(amax);
  if (byte >= kSafeByte) {
    encode_block<Type>(raw, byte, codes);
  } else {
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t bits = Type::widen(raw[i]);
      codes[i] =
          static_cast<uint8_t>(encode_exactly(bits & 0x7FFFFFFF, byte) | ((bits >> 24) & 0x80));
    }
  }
  return static_cast<uint8_t>(byte);
}

// Decodes a block to float32 bit patterns.
inline void decode_block(const uint8_t* codes, uint8_t byte, uint32_t (&bits)[kBlock]) {
  if (byte == 255) {
    for (int i = 0; i < kBlock; ++i) bits[i] = 0x7FC00000;
    return;
  }
  if (byte < kSafeByte) {
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t code = codes[i], magnitude = code & 0x7F, field = magnitude >> 3;
      // value = significand * 2^exponent, always a multiple of 2^-149
      const uint32_t significand = field ? 8 | (magnitude & 7) : magnitude;
      const int exponent = (field ? static_cast<int>(field) : 1) - 10 + byte - 127;
      uint32_t value = 0;
      if (magnitude == 0x7F) {
        value = 0x7FC00000;
      } else if (significand) {
        int top = exponent;
        for (uint32_t s = significand; s > 1; s >>= 1) ++top;
        value = top < -126 ? significand << (exponent + 149)
                           : (static_cast<uint32_t>(top + 127) << 23) |
                                 ((significand << (23 - (top - exponent))) & 0x7FFFFF);
      }
      bits[i] = value | (code & 0x80) << 24;
    }
    return;
  }
  const float scale = as_float(static_cast<uint32_t>(byte) << 23);
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t code = codes[i], magnitude = code & 0x7F;
    const float normal = as_float((magnitude << 20) + (120u << 23));
    const float subnormal = as_float((magnitude << 20) + (121u << 23)) - as_float(121u << 23);
    const float value = (magnitude < 8 ? subnormal : normal) * scale;
    const uint32_t result = magnitude == 0x7F ? 0x7FC00000 : as_bits(value);
    bits[i] = result | (code & 0x80) << 24;
  }
}

}  // namespace
