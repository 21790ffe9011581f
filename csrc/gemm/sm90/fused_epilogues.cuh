// Epilogues of Hopper's GEMMs of 8-bit operands, and the tiles in shared memory that they take.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "cuda/sm90/shared_memory.cuh"
#include "fused/arithmetic.cuh"
#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8::detail::fused_gemm {

constexpr int kGroupTokens = 64;  // that a warpgroup multiplies
constexpr int kWideRows = 256;    // of B in a tile, copied in two halves; Scale takes fewer too
// A warpgroup's tokens are left in boxes of 64 columns; each warp has 16 tokens of them.
constexpr int kBoxColumns = 64, kWideBoxes = kWideRows / kBoxColumns;
constexpr int kWarpTokens = 16;
constexpr int kBoxBytes = kGroupTokens * kBoxColumns * 2;

// A warp's 16 tokens in boxes, as TMA swizzles them.
struct SmemTile {
  uint32_t address;

  // Where eight columns are: piece 0 to 7 of a box.
  __device__ uint32_t piece(int token, int box, int of_box) const {
    return address + box * kBoxBytes + token * kBoxColumns * 2 + (of_box ^ token % 8) * 16;
  }
};

// Eight columns of BF16, or of scales, as float32.
struct Vec8 {
  float of[8];

  __device__ void load(uint32_t address) {
    const float4 words = load_shared(address);
    unpack(__float_as_uint(words.x), 0);
    unpack(__float_as_uint(words.y), 2);
    unpack(__float_as_uint(words.z), 4);
    unpack(__float_as_uint(words.w), 6);
  }

  __device__ void load(const float* scales) {
    const auto* const fours = reinterpret_cast<const float4*>(scales);
    const float4 low = __ldg(fours), high = __ldg(fours + 1);
    of[0] = low.x, of[1] = low.y, of[2] = low.z, of[3] = low.w;
    of[4] = high.x, of[5] = high.y, of[6] = high.z, of[7] = high.w;
  }

  __device__ void scale(float of_token, const Vec8& of_columns) {
#pragma unroll
    for (int i = 0; i < 8; ++i) of[i] = __fmul_rn(__fmul_rn(of[i], of_token), of_columns.of[i]);
  }

  __device__ float sum_of_squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fmaf_rn(of[i], of[i], sum);
    return sum;
  }

  __device__ void store(uint32_t address) const {
    store_shared(address, make_uint4(round2(of[0], of[1]), round2(of[2], of[3]),
                                     round2(of[4], of[5]), round2(of[6], of[7])));
  }

 private:
  __device__ void unpack(uint32_t pair, int at) {
    of[at] = __uint_as_float(pair << 16);
    of[at + 1] = __uint_as_float(pair & 0xFFFF0000);
  }
};

struct Operands {
  const float* a_scales;
  const float* b_scales;
  int m, n, k;
};

// What an epilogue does to the values of a tile first: it scales sums that were rounded as they
// were.
class ScaleValues {
 public:
  using Columns = Vec8;

  __device__ ScaleValues(const Operands& operands, int first_token)
      : operands_(operands),
        of_token_(__ldg(operands.a_scales +
                        min(first_token + int(threadIdx.x) % kWarpTokens, operands.m - 1))) {}

  // Of eight columns, which come from rows of B. N is a multiple of 8.
  __device__ Columns columns(int row) const {
    Columns scales;
    scales.load(operands_.b_scales + min(row, operands_.n - 8));
    return scales;
  }

  __device__ void operator()(Vec8& values, int token, const Columns& columns) const {
    values.scale(__shfl_sync(~0u, of_token_, token), columns);
  }

 private:
  const Operands& operands_;
  float of_token_;  // one token in each lane of 16
};

// The values have been scaled already.
class KeepValues {
 public:
  struct Columns {};
  __device__ KeepValues(const Operands&, int) {}
  __device__ Columns columns(int) const { return {}; }
  __device__ void operator()(Vec8&, int, const Columns&) const {}
};

// ---- Epilogues. Each has the columns of D that a tile gives, the row of B at which each half of a
// tile of B begins, and the operation, in place on a warp's tokens. It takes a few tokens at a
// time, so that their loads overlap. `Scaling` is ScaleValues or KeepValues.

constexpr int kTogether = 4;

// The scales alone.
template <class Scaling, int rows>
struct Scale {
  static constexpr int kRows = rows, kColumns = rows;

  __device__ int row_of_b(int tile, int half) const { return tile * kRows + half * kRows / 2; }

  __device__ void operator()(SmemTile boxes, const Operands& operands, int first_token,
                             int tile) const {
    if constexpr (std::is_same_v<Scaling, KeepValues>) return;
    static_assert(std::is_same_v<Scaling, KeepValues> || rows == kWideRows);
    const int lane = threadIdx.x % 32, box = lane / 8, piece = lane % 8;
    const Scaling scale(operands, first_token);
    const auto columns = scale.columns(tile * kRows + lane * 8);
#pragma unroll 1
    for (int first = 0; first < kWarpTokens; first += kTogether) {
      Vec8 values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i].load(boxes.piece(first + i, box, piece));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        scale(values[i], first + i, columns);
        values[i].store(boxes.piece(first + i, box, piece));
      }
    }
  }
};

// Half of a tile of B belongs to the gate, half to the factor that the gate multiplies.
template <class Scaling>
struct SiluMultiply {
  static constexpr int kRows = kWideRows, kColumns = kRows / 2;
  int columns;  // of D

  __device__ int row_of_b(int tile, int half) const { return tile * kColumns + half * columns; }

  __device__ void operator()(SmemTile boxes, const Operands& operands, int first_token,
                             int tile) const {
    const int lane = threadIdx.x % 32, box = lane % 16 / 8, piece = lane % 8;
    const int column = min(tile * kColumns + lane % 16 * 8, columns - 8);
    const Scaling scale(operands, first_token);
    const auto of_gate = scale.columns(column), of_up = scale.columns(columns + column);
#pragma unroll 1
    for (int first = lane / 16; first < kWarpTokens; first += 2 * kTogether) {
      Vec8 gate[kTogether], up[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        gate[i].load(boxes.piece(first + 2 * i, box, piece));
        up[i].load(boxes.piece(first + 2 * i, box + kWideBoxes / 2, piece));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        scale(gate[i], first + 2 * i, of_gate);
        scale(up[i], first + 2 * i, of_up);
#pragma unroll
        for (int e = 0; e < 8; ++e) gate[i].of[e] = __fmul_rn(silu(gate[i].of[e]), up[i].of[e]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) gate[i].store(boxes.piece(first + 2 * i, box, piece));
    }
  }
};

// A tile has two heads, with half of the lanes each.
template <class Scaling>
struct RotateHeads {
  static constexpr int kRows = kWideRows, kColumns = kRows;
  static constexpr int kLanes = 16;
  const uint4* q_weight;  // eight BF16 each
  const uint4* k_weight;
  const float4* rotations;  // two pairs each
  int64_t rotation_stride;  // of a row
  int q_heads;
  int heads;  // of q and k
  float eps;

  __device__ int row_of_b(int tile, int half) const { return tile * kRows + half * kRows / 2; }

  __device__ void operator()(SmemTile boxes, const Operands& operands, int first_token,
                             int tile) const {
    const int lane = threadIdx.x % 32, box = lane / 8, piece = lane % 8;
    const Scaling scale(operands, first_token);
    const auto columns = scale.columns(tile * kRows + lane * 8);
    const auto load_scaled = [&](int first, Vec8(&values)[kTogether]) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i].load(boxes.piece(first + i, box, piece));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) scale(values[i], first + i, columns);
    };
    const auto store = [&](int first, const Vec8(&values)[kTogether]) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i].store(boxes.piece(first + i, box, piece));
    };
    Vec8 values[kTogether];
    if (tile * 2 >= heads) {  // neither head is of q or k
#pragma unroll 1
      for (int first = 0; first < kWarpTokens; first += kTogether) {
        load_scaled(first, values);
        store(first, values);
      }
      return;
    }
    const int head = tile * 2 + lane / kLanes;
    Weight weight;
    weight.vector = __ldg((head < q_heads ? q_weight : k_weight) + lane % kLanes);
    RotationPairs next = load_turns(first_token, operands.m);
#pragma unroll 1
    for (int first = 0; first < kWarpTokens; first += kTogether) {
      const RotationPairs turns = next;
      next = load_turns(first_token + min(first + kTogether, kWarpTokens - 1), operands.m);
      load_scaled(first, values);
      float mean[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) mean[i] = values[i].sum_of_squares() * (1.0f / kHeadSize);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) mean[i] += __shfl_xor_sync(~0u, mean[i], step);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float factor = rsqrtf(__fadd_rn(mean[i], eps));
        const Vec8 rotated = normed_and_rotated(values[i], weight, factor, turns.of[i]);
        if (head < heads) values[i] = rotated;  // after an odd number of heads the last is not
      }
      store(first, values);
    }
  }

 private:
  union Weight {
    uint4 vector;
    uint32_t pair[4];
  };

  // Cosines and sines of a lane's columns, for tokens that are taken together.
  struct RotationPairs {
    float4 of[kTogether][2];
  };

  __device__ RotationPairs load_turns(int token, int tokens) const {
    RotationPairs turns;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float4* const of_row =
          rotations + min(token + i, tokens - 1) * rotation_stride + threadIdx.x % kLanes * 2;
      turns.of[i][0] = __ldg(of_row);
      turns.of[i][1] = __ldg(of_row + 1);
    }
    return turns;
  }

  static __device__ Vec8 normed_and_rotated(const Vec8& values, const Weight& weight, float factor,
                                            const float4 (&turns)[2]) {
    Vec8 result;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const uint32_t pair = weight.pair[e / 2];
      const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000);
      const float2 normed = {__fmul_rn(__fmul_rn(values.of[e], low), factor),
                             __fmul_rn(__fmul_rn(values.of[e + 1], high), factor)};
      const float4& turn = turns[e / 4];
      const float2 rotated =
          rotate(normed, e % 4 == 0 ? float2{turn.x, turn.y} : float2{turn.z, turn.w});
      result.of[e] = rotated.x;
      result.of[e + 1] = rotated.y;
    }
    return result;
  }
};

}  // namespace zimage_mxfp8::detail::fused_gemm
