#include <cuda_bf16.h>
#include <math_constants.h>
#include <stdint.h>

#include "attention/attention_cuda.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "fused/arithmetic.cuh"
#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpQueries = 4;
constexpr int kQueries = kWarps * kWarpQueries;  // of a block
constexpr int kKeys = 32;                        // of a tile; one for each lane
constexpr int kWords = kHeadSize / 2;            // pairs of BF16 in a head
constexpr int kLoads = kHeadSize / 8;            // of 16 bytes in a head

struct Sequence {
  const uint16_t* qkv;
  uint16_t* out;
  int64_t stride, out_stride;  // elements
  int length, heads;
};

// 16 bytes of a token's head in q (part 0), k (1) or v (2); zeros for a token beyond the sequence.
__device__ uint4 load8(const Sequence& sequence, int part, int token, int chunk) {
  if (token >= sequence.length) return make_uint4(0, 0, 0, 0);
  const int64_t column = (int64_t{part} * sequence.heads + blockIdx.y) * kHeadSize + chunk * 8;
  return *reinterpret_cast<const uint4*>(sequence.qkv + token * sequence.stride + column);
}

__device__ float2 widen2(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}

__device__ float lane_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  }
  return value;
}

// A block computes kQueries tokens of the head blockIdx.y, with a running softmax over tiles of
// keys. A lane computes the score of one key, and the columns 2 * lane, 2 * lane + 1 and both + 64
// of the results.
__global__ void __launch_bounds__(kThreads) attend_kernel(const Sequence sequence) {
  __shared__ float2 queries[kQueries][kWords];
  __shared__ uint32_t keys[kKeys][kWords + 1];  // one more: lanes read rows, from all banks
  alignas(16) __shared__ uint32_t values[kKeys][kWords];  // written 16 bytes at a time
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kWarpQueries;
  const int begin = blockIdx.x * kQueries;

  // exp(x / sqrt(128)) = exp2(x * factor)
  const float factor = 1.4426950408889634f * rsqrtf(float(kHeadSize));
  for (int i = threadIdx.x; i < kQueries * kLoads; i += kThreads) {
    const int row = i / kLoads, chunk = i % kLoads;
    const uint4 loaded = load8(sequence, 0, begin + row, chunk);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = widen2(words[w]);
      queries[row][chunk * 4 + w] = {pair.x * factor, pair.y * factor};
    }
  }

  float largest[kWarpQueries], sum[kWarpQueries] = {};
  float2 result[kWarpQueries][2] = {};
#pragma unroll
  for (int i = 0; i < kWarpQueries; ++i) largest[i] = -CUDART_INF_F;

  for (int tile = 0; tile < sequence.length; tile += kKeys) {
    __syncthreads();  // the tile before is used, the queries are written
    for (int i = threadIdx.x; i < kKeys * kLoads; i += kThreads) {
      const int row = i / kLoads, chunk = i % kLoads;
      const uint4 key = load8(sequence, 1, tile + row, chunk);
      const uint32_t words[4] = {key.x, key.y, key.z, key.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) keys[row][chunk * 4 + w] = words[w];
      *reinterpret_cast<uint4*>(&values[row][chunk * 4]) = load8(sequence, 2, tile + row, chunk);
    }
    __syncthreads();

    float weight[kWarpQueries] = {};
    for (int w = 0; w < kWords; ++w) {
      const float2 key = widen2(keys[lane][w]);
#pragma unroll
      for (int i = 0; i < kWarpQueries; ++i) {
        const float2 query = queries[first + i][w];
        weight[i] = fmaf(query.x, key.x, fmaf(query.y, key.y, weight[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpQueries; ++i) {
      const float score = tile + lane < sequence.length ? weight[i] : -CUDART_INF_F;
      const float next = fmaxf(largest[i], lane_max(score));
      const float correction = exp2f(largest[i] - next);
      weight[i] = exp2f(score - next);
      largest[i] = next;
      sum[i] = sum[i] * correction + lane_sum<32>(weight[i]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        result[i][half].x *= correction;
        result[i][half].y *= correction;
      }
    }
    for (int key = 0; key < kKeys; ++key) {
      const float2 value[2] = {widen2(values[key][lane]), widen2(values[key][lane + 32])};
#pragma unroll
      for (int i = 0; i < kWarpQueries; ++i) {
        const float share = __shfl_sync(~0u, weight[i], key);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          result[i][half].x = fmaf(share, value[half].x, result[i][half].x);
          result[i][half].y = fmaf(share, value[half].y, result[i][half].y);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kWarpQueries; ++i) {
    const int token = begin + first + i;
    if (token >= sequence.length) continue;
    auto* row = reinterpret_cast<uint32_t*>(sequence.out + token * sequence.out_stride +
                                            int64_t{blockIdx.y} * kHeadSize);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[lane + 32 * half] = round2(result[i][half].x / sum[i], result[i][half].y / sum[i]);
    }
  }
}

}  // namespace

void attend_cuda(const ConstMatrixView& qkv, int64_t heads, const std::vector<int64_t>& lengths,
                 const MatrixView& out, CudaStream stream) {
  constexpr int64_t most_heads = 65535;  // blocks along y
  if (heads > most_heads) throw InvalidArgument("the device takes up to 65535 heads");
  Sequence sequence{static_cast<const uint16_t*>(qkv.data),
                    static_cast<uint16_t*>(out.data),
                    qkv.row_stride,
                    out.row_stride,
                    0,
                    static_cast<int>(heads)};
  for (const int64_t length : lengths) {
    if (length == 0) continue;
    const uint32_t tokens = checked_count(length);
    sequence.length = static_cast<int>(tokens);
    launch(attend_kernel, dim3(grid_for(tokens, kQueries), static_cast<uint32_t>(heads)), kThreads,
           stream, sequence);
    sequence.qkv += length * qkv.row_stride;
    sequence.out += length * out.row_stride;
  }
}

}  // namespace zimage_mxfp8::detail
