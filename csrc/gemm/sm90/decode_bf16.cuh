// E4M3 codes and E8M0 scales to BF16, exactly for scale bytes of 3 and more, in few instructions:
// two codes to a pair times 2^-120, which the factor for the pair's block makes up for.
#pragma once

#include <stdint.h>

namespace zimage_mxfp8::detail {

__device__ inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Two E4M3 codes in the low bytes as BF16, times 2^-120: with E4M3's exponent field in BF16's, and
// subnormals as subnormals. Codes for NaN come out as 480 (the block is NaN if its scale is).
__device__ inline uint32_t decode_pair(uint32_t codes) {
  uint32_t extended;  // a byte, and its sign eight times; twice
  asm("prmt.b32 %0, %1, 0, 0x9180;" : "=r"(extended) : "r"(codes));
  return (extended << 4) & 0x87F087F0;
}

// The factor 2^120 * 2^(byte - 127) for decode_pair(), twice. It does not fit BF16 from this byte
// on: then it is split.
constexpr uint32_t kFirstSplitByte = 135;

__device__ inline uint32_t scale_pair(uint32_t byte) {
  return (min(byte, kFirstSplitByte - 1) + 120) * 0x00800080;
}

// The other part of a split factor; NaN for byte 255.
__device__ inline uint32_t rest_pair(uint32_t byte) {
  const uint32_t field = byte == 255 ? 0x7FC0 : (byte < kFirstSplitByte ? 127 : byte - 7) << 7;
  return field | field << 16;
}

}  // namespace zimage_mxfp8::detail
