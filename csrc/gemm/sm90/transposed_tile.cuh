// How mixed_sm90 stores its results: a warpgroup has 64 weights of D^T in registers, as wgmma
// leaves them (see wgmma.cuh), and writes D through shared memory, some tokens at a time.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

#include "cuda/sm90/mbarrier.cuh"
#include "cuda/sm90/shared_memory.cuh"
#include "cuda/sm90/tma.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace zimage_mxfp8::detail {

constexpr int kGroupWeights = 64;  // rows of W that a warpgroup multiplies

// Tokens that are written at a time, from one of a warpgroup's buffers: fewer if a tile has fewer.
constexpr int kOutTokens = 32;
constexpr int kOutBytes = kOutTokens * kGroupWeights * 2;  // of a buffer
constexpr int out_tokens(int tile_tokens) {
  return tile_tokens < kOutTokens ? tile_tokens : kOutTokens;
}

// The bias of the two rows of weights that a thread has, of the warpgroup's that begin at `weight`.
struct BiasPair {
  float of[2];
};

__device__ inline BiasPair load_bias(const __nv_bfloat16* bias, int weight, int n) {
  const int first = weight + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  const auto load = [&](int at) { return bias && at < n ? __bfloat162float(bias[at]) : 0.0f; };
  return {{load(first), load(first + 8)}};
}

// Writes a warpgroup's 64 weights x `tokens` of D, which begin at (token, weight). `out` are the
// warpgroup's buffers, `next` the one to use.
template <int tokens, int buffers>
__device__ void store_tile(const CUtensorMap& d_map, const float (&sums)[tokens / 2], BiasPair bias,
                           int token, int weight, uint32_t out, int& next, int barrier) {
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int first = 0; first < tokens; first += out_tokens(tokens)) {
    const uint32_t buffer = out + next * kOutBytes;
#pragma unroll
    for (int pair = 0; pair < out_tokens(tokens) / 16; ++pair) {
      // Four 8x8 matrices, [8 tokens][8 weights] each when transposed: two groups of tokens times
      // the thread's rows and those 8 below.
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = ((first / 8) + pair * 2 + i / 2) * 4 + i % 2 * 2;
        const __nv_bfloat162 two =
            __floats2bfloat162_rn(sums[at] + bias.of[i % 2], sums[at + 1] + bias.of[i % 2]);
        packed[i] = reinterpret_cast<const uint32_t&>(two);
      }
      // In rows of 64 weights, swizzled as TMA expects it.
      const int matrix = lane / 8, row = pair * 16 + matrix / 2 * 8 + lane % 8;
      const int piece = warp * 2 + matrix % 2;
      store_matrices_transposed(buffer + row * kGroupWeights * 2 + (piece ^ row % 8) * 16, packed);
    }
    tma_store_fence();
    // After the barrier the next buffer is free, too: the copy that was started from it has read
    // it.
    if (thread == 0) tma_store_wait_read<buffers - 2>();
    named_barrier(barrier, kWarpgroup);
    if (thread == 0) {
      tma_store_2d(d_map, buffer, weight, token + first);
      tma_store_commit();
    }
    next = next == buffers - 1 ? 0 : next + 1;
  }
}

}  // namespace zimage_mxfp8::detail
