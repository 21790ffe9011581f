// Sums and maxima over the threads of a block. Shared memory comes from the caller: with an array
// for each reduction, no barrier is needed between one reduction and the next.
#pragma once

#include <stdint.h>

namespace zimage_mxfp8::detail {

// Sum over groups of `lanes` adjacent lanes, in each of them.
template <int lanes>
__device__ float lane_sum(float value) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// The largest value of a block of `warps` warps, in each thread.
template <int warps>
__device__ uint32_t block_max(uint32_t value, uint32_t (&of_warp)[warps]) {
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < warps; ++i) value = max(value, of_warp[i]);
  return value;
}

struct SumMax {
  float sum;
  uint32_t max;
};

// The sum and the largest value of a block in one reduction, in each thread. The order of the sum
// is always the same.
template <int warps>
__device__ SumMax block_sum_max(SumMax value, SumMax (&of_warp)[warps]) {
  value = {lane_sum<32>(value.sum), __reduce_max_sync(~0u, value.max)};
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  SumMax total{0.0f, 0};
#pragma unroll
  for (int i = 0; i < warps; ++i) {
    total.sum += of_warp[i].sum;
    total.max = max(total.max, of_warp[i].max);
  }
  return total;
}

}  // namespace zimage_mxfp8::detail
