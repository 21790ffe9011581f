// Narrow GEMMs of E4M3 codes and F16 on Hopper, D[M, R] = A[M, K] B[R, K]^T for a small R.
//
// A block multiplies 32 tokens with 32 rows of B, so that a few thousand tokens occupy the whole
// device. Its warps split K and read their parts straight into registers: every element of A is
// needed once. The order of K within a step is that in which a thread finds 16 bytes of codes,
// alike for A and B, so nothing is shuffled. Codes become F16 exactly. At the end the warps' sums
// are added in a fixed order.
#include <cuda_fp8.h>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "fused/arithmetic.cuh"
#include "gemm/sm90/narrow.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * 32;
constexpr int kTokens = 32, kTokenTiles = kTokens / 16;         // tiles of mma
constexpr int kRows = int(kNarrowRows), kRowTiles = kRows / 8;  // of B
constexpr int kStep = 64;                                       // of K for a warp
constexpr int kPiece = kStep / 4;                               // bytes of codes for a thread

__device__ uint32_t two_halves(uint16_t codes) {
  const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);
  return both.x | uint32_t(both.y) << 16;
}

// 16 by 8: sums += a b^T, 16 of K.
__device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_low,
                         uint32_t b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

struct Parameters {
  const uint8_t* a;
  const __half* b;
  const float* factors;
  __nv_bfloat16* d;
  int64_t b_stride, d_stride;
  int m, k;
};

__global__ void __launch_bounds__(kThreads) narrow_gemm_kernel(const Parameters p) {
  __shared__ float parts[kWarps / 2][kTokens][kRows];  // of half of the warps at a time
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, piece = lane % 4;
  const int first_token = blockIdx.x * kTokens, first_row = blockIdx.y * kRows;
  // Rows beyond the last are read as that one, and their sums are not stored.
  const uint8_t* a[kTokenTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = min(first_token + tile * 16 + half * 8 + row, p.m - 1);
      a[tile][half] = p.a + int64_t(token) * p.k;
    }
  }
  const __half* const b = p.b + (first_row + row) * p.b_stride;

  float sums[kTokenTiles][kRowTiles][4] = {};
#pragma unroll 2
  for (int step = warp * kStep; step < p.k; step += kWarps * kStep) {
    const int at = step + piece * kPiece;
    const bool inside = at < p.k;  // K is a multiple of 32, a piece is 16 of it
    uint4 codes[kTokenTiles][2], weights[kRowTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        codes[tile][half] = inside ? __ldg(reinterpret_cast<const uint4*>(a[tile][half] + at))
                                   : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const auto* const of_row = reinterpret_cast<const uint4*>(b + tile * 8 * p.b_stride + at);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[tile][i] = inside ? __ldg(of_row + i) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {  // four codes, 16 of K in all threads
      const auto word_of = [](const uint4& four, int i) {
        return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
      };
      uint32_t of_a[kTokenTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t four = word_of(codes[tile][half], word);
          of_a[tile][half] = two_halves(uint16_t(four));
          of_a[tile][half + 2] = two_halves(uint16_t(four >> 16));
        }
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const uint4& eight = weights[tile][word / 2];
        const uint32_t low = word_of(eight, word % 2 * 2), high = word_of(eight, word % 2 * 2 + 1);
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) multiply(sums[i][tile], of_a[i], low, high);
      }
    }
  }
  // The upper warps leave their sums, the lower ones add theirs to them.
  const auto each_pair = [&](auto operation) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = i * 16 + half * 8 + row, column = tile * 8 + piece * 2;
          auto* const pair = reinterpret_cast<float2*>(&parts[warp % (kWarps / 2)][token][column]);
          operation(*pair, sums[i][tile][half * 2], sums[i][tile][half * 2 + 1]);
        }
      }
    }
  };
  if (warp >= kWarps / 2) {
    each_pair([](float2& pair, float first, float second) { pair = {first, second}; });
  }
  __syncthreads();
  if (warp < kWarps / 2) {
    each_pair(
        [](float2& pair, float first, float second) { pair = {pair.x + first, pair.y + second}; });
  }
  __syncthreads();
  constexpr int kEach = kTokens * kRows / kThreads;
  static_assert(kEach == 2);
  const int token = threadIdx.x * kEach / kRows, column = threadIdx.x * kEach % kRows;
  if (first_token + token >= p.m) return;
  float2 total = {0.0f, 0.0f};
#pragma unroll
  for (const auto& part : parts) {
    const float2 pair = *reinterpret_cast<const float2*>(&part[token][column]);
    total = {total.x + pair.x, total.y + pair.y};
  }
  const float2 factors = __ldg(reinterpret_cast<const float2*>(p.factors + first_row + column));
  *reinterpret_cast<uint32_t*>(p.d + (first_token + token) * p.d_stride + first_row + column) =
      round2(total.x * factors.x, total.y * factors.y);
}

}  // namespace

void narrow_gemm_sm90(const ConstRowScaledView& a, const ConstMatrixView& b, const float* factors,
                      const MatrixView& d, CudaStream stream) {
  const Parameters p{a.codes,
                     static_cast<const __half*>(b.data),
                     factors,
                     static_cast<__nv_bfloat16*>(d.data),
                     b.row_stride,
                     d.rows > 1 ? d.row_stride : d.cols,
                     static_cast<int>(a.rows),
                     static_cast<int>(a.cols)};
  const dim3 blocks(checked_count(ceil_div(a.rows, kTokens)), checked_count(b.rows / kRows));
  launch(narrow_gemm_kernel, blocks, kThreads, stream, p);
}

}  // namespace zimage_mxfp8::detail
