// Narrow GEMMs of E4M3 codes on Hopper, D[M, R] = A[M, K] B[R, K]^T for a small R.
//
// B is a sum of two matrices of codes (see narrow_gemm in gemm.h), whose rows alternate, so that a
// thread holds both sums of an element of D. A block multiplies 128 tokens with up to 128 rows of B
// and a part of K; the blocks of a cluster have the parts of one tile, add their sums in a fixed
// order, and store a share of the tokens each. Few tokens are divided into more parts.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/cluster.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/shared_memory.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/tma.cuh"
#include "cuda/sm90/wgmma.cuh"
#include "fused/arithmetic.cuh"
#include "gemm/sm90/narrow.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kMultiplying = kConsumers * kWarpgroup, kThreads = kMultiplying + 32;
constexpr int kGroupTokens = 64;  // that a warpgroup multiplies
constexpr int kTokens = kConsumers * kGroupTokens;
constexpr int kDepth = 128;          // of K in a stage: as wide as TMA's swizzle
constexpr int kStageBytes = 196608;  // of all stages
constexpr int kMaxParts = 8;         // blocks of a cluster
constexpr double kFilled = 0.9;      // clusters do not fill every multiprocessor
constexpr int kABytes = kTokens * kDepth;

// `rows` of D's columns in a tile: twice as many of codes.
template <int rows_>
struct Tile {
  static constexpr int rows = rows_, code_rows = 2 * rows;
  static constexpr int b_bytes = code_rows * kDepth;
  static constexpr int stages = kStageBytes / (kABytes + b_bytes);
  using Ring = Pipeline<stages, kConsumers, 1>;
  static constexpr int b_at = stages * kABytes;
  static constexpr int barriers_at = b_at + stages * b_bytes;
  static constexpr int shared_bytes = barriers_at + Ring::Barriers::bytes + kTmaAlignment;
  // Sums take the place of the stages. The odd pitch spreads a warp's over the banks.
  static constexpr int pitch = rows + 4;
  static_assert(shared_bytes <= 232448 && kTokens * pitch * 4 <= barriers_at);
};

struct Parameters {
  const float2* scales;  // of the two rows of codes of each row of B
  const float* factors;
  __nv_bfloat16* d;
  int64_t d_stride;
  int m, k;
  int row_tiles;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    narrow_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                       const __grid_constant__ CUtensorMap b_map, const Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  extern __shared__ uint8_t unaligned[];
  const uint32_t shared = tma_aligned(unaligned);
  const int part = block_of_cluster(), parts = blocks_of_cluster();
  const int tile = blockIdx.x / parts, row_tile = tile % p.row_tiles;
  const int first_token = tile / p.row_tiles * kTokens, first_row = row_tile * T::rows;
  const typename T::Ring pipeline{{shared + T::barriers_at}, part};
  if (threadIdx.x == 0) {
    pipeline.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  await_predecessors();
  const int steps = (p.k + kDepth - 1) / kDepth;
  const int begin = steps * part / parts, end = steps * (part + 1) / parts;

  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  if (warpgroup < kConsumers) {
    const int thread = threadIdx.x % kWarpgroup;
    float sums[T::code_rows / 2];
    typename T::Ring::State state;
    int previous = 0;
    for (int step = begin; step < end; ++step) {
      pipeline.wait(state);
      const uint64_t a =
          wgmma_descriptor(shared + state.stage * kABytes + warpgroup * kGroupTokens * kDepth);
      const uint64_t b = wgmma_descriptor(shared + T::b_at + state.stage * T::b_bytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 32; ++i) {
        constexpr uint64_t step_of_32 = 32 / 16;
        WgmmaFP8<T::code_rows>::multiply(sums, a + i * step_of_32, b + i * step_of_32,
                                         step > begin || i > 0);
      }
      wgmma_commit();
      wgmma_wait_pending<1>();
      if (step > begin) pipeline.release(previous, thread);
      previous = state.stage;
      state.advance();
    }
    wgmma_wait(sums);
    named_barrier(1, kMultiplying);  // all stages have been read
    const int token = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < T::rows / 4; ++i) {
      const int row = 4 * i + lane % 4;
      const float2 scales = __ldg(p.scales + first_row + row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const two = sums + 4 * i + 2 * half;
        const float sum = __fmaf_rn(two[1], scales.y, __fmul_rn(two[0], scales.x));
        store_shared(shared + ((token + 8 * half) * T::pitch + row) * 4, sum);
      }
    }
  } else if (lane == 0) {
    prefetch_tensor_map(a_map);
    prefetch_tensor_map(b_map);
    typename T::Ring::State state;
    for (int step = begin; step < end; ++step) {
      const uint32_t full = pipeline.acquire(state, kABytes + T::b_bytes);
      tma_load_2d(a_map, full, shared + state.stage * kABytes, step * kDepth, first_token);
      tma_load_2d(b_map, full, shared + T::b_at + state.stage * T::b_bytes, step * kDepth,
                  2 * first_row);
      state.advance();
    }
  }
  __syncwarp();
  cluster_sync();
  const int first = kTokens * part / parts, last = kTokens * (part + 1) / parts;
  const int count = (min(first_token + last, p.m) - first_token - first) * (T::rows / 2);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = first + i / (T::rows / 2), row = i % (T::rows / 2) * 2;
    const uint32_t address = shared + (token * T::pitch + row) * 4;
    float2 total = {0.0f, 0.0f};
    for (int block = 0; block < parts; ++block) {
      const float2 sums = load_shared(address, block);
      total = {total.x + sums.x, total.y + sums.y};
    }
    const float2 factors = __ldg(reinterpret_cast<const float2*>(p.factors + first_row + row));
    *reinterpret_cast<uint32_t*>(p.d + (first_token + token) * p.d_stride + first_row + row) =
        round2(total.x * factors.x, total.y * factors.y);
  }
  cluster_sync();  // no block leaves while others read its sums
#endif
}

template <class T>
void run(const ConstRowScaledView& a, const ConstRowScaledView& b, const float* factors,
         const MatrixView& d, CudaStream stream) {
  const Parameters p{reinterpret_cast<const float2*>(b.scales),
                     factors,
                     static_cast<__nv_bfloat16*>(d.data),
                     d.rows > 1 ? d.row_stride : d.cols,
                     static_cast<int>(a.rows),
                     static_cast<int>(a.cols),
                     static_cast<int>(d.cols / T::rows)};
  const auto map_of = [](const ConstRowScaledView& matrix, int box_rows) {
    return tensor_map(matrix.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, matrix.rows, matrix.cols,
                      matrix.cols, box_rows);
  };
  const int64_t tiles = ceil_div(a.rows, kTokens) * p.row_tiles;
  const auto filled = static_cast<int64_t>(kFilled * multiprocessors(current_device()));
  const int64_t steps = ceil_div(a.cols, kDepth);
  const int64_t parts = std::clamp<int64_t>(filled / tiles, 1, std::min<int64_t>(steps, kMaxParts));
  launch_clusters(narrow_gemm_kernel<T>, checked_count(tiles), static_cast<uint32_t>(parts),
                  kThreads, T::shared_bytes, stream, map_of(a, kTokens), map_of(b, T::code_rows),
                  p);
}

}  // namespace

void narrow_gemm_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                      const float* factors, const MatrixView& d, CudaStream stream) {
  static_assert(kNarrowRows == 32);
  if (d.cols % 128 == 0) return run<Tile<128>>(a, b, factors, d, stream);
  if (d.cols % 64 == 0) return run<Tile<64>>(a, b, factors, d, stream);
  run<Tile<32>>(a, b, factors, d, stream);
}

}  // namespace zimage_mxfp8::detail
