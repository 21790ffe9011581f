// Narrow GEMMs on Hopper, D[M, R] = A[M, K] B[R, K]^T for a small R, of BF16 or of 8-bit codes.
//
// B of codes is a sum of two matrices (see narrow_gemm in gemm.h), whose rows alternate, so that a
// thread holds both sums of an element of D. A block multiplies 128 tokens with up to 128 columns
// of D and a part of K; the blocks of a cluster have the parts of one tile, add their sums in a
// fixed order, and store a share of the tokens each. Few tokens are divided into more parts.
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
constexpr int kDepthBytes = 128;  // of K in a stage: as wide as TMA's swizzle
constexpr int kABytes = kTokens * kDepthBytes;
constexpr int kStageBytes = 196608;  // of all stages
constexpr int kMaxParts = 8;         // blocks of a cluster
constexpr double kFilled = 0.9;      // clusters do not fill every multiprocessor

// What A and B are made of.
struct BF16 {
  using Sum = float;
  static constexpr int bytes = 2;
  static constexpr int terms = 1;  // rows of B for a column of D
  template <int n>
  static __device__ void multiply(float (&sums)[n / 2], uint64_t a, uint64_t b) {
    WgmmaShared<n>::multiply(sums, a, b);
  }
};

struct E4M3 {
  using Sum = float;
  static constexpr int bytes = 1;
  static constexpr int terms = 2;
  template <int n>
  static __device__ void multiply(float (&sums)[n / 2], uint64_t a, uint64_t b) {
    WgmmaFP8<n>::multiply(sums, a, b, true);
  }
};

struct Int8 {
  using Sum = int32_t;
  static constexpr int bytes = 1;
  static constexpr int terms = 2;
  template <int n>
  static __device__ void multiply(int32_t (&sums)[n / 2], uint64_t a, uint64_t b) {
    WgmmaInt8<n>::multiply(sums, a, b, true);
  }
};

// A tile with some columns of D.
template <class Element_, int columns_>
struct Tile {
  using Element = Element_;
  static constexpr int columns = columns_, b_rows = columns * Element::terms;
  static constexpr int depth = kDepthBytes / Element::bytes;
  static constexpr int b_bytes = b_rows * kDepthBytes;
  static constexpr int stages = kStageBytes / (kABytes + b_bytes);
  using Ring = Pipeline<stages, kConsumers, 1>;
  static constexpr int b_at = stages * kABytes;
  static constexpr int barriers_at = b_at + stages * b_bytes;
  static constexpr int shared_bytes = barriers_at + Ring::Barriers::bytes + kTmaAlignment;
  // The sums reuse the memory of the stages. The pitch spreads a warp's sums over the banks.
  static constexpr int pitch = columns + 4;
  static_assert(shared_bytes <= 232448 && kTokens * pitch * 4 <= barriers_at);
};

struct Parameters {
  const float* a_scales;  // null if D leaves them out
  const float2* scales;   // of the two rows of codes for each column of D
  const float* factors;
  __nv_bfloat16* d;
  int64_t d_stride;
  int m, k;
  int column_tiles;
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
  const int tile = blockIdx.x / parts;
  const int first_token = tile / p.column_tiles * kTokens;
  const int first_column = tile % p.column_tiles * T::columns;  // of D
  const typename T::Ring pipeline{{shared + T::barriers_at}, part};
  if (threadIdx.x == 0) {
    pipeline.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  await_predecessors();
  const int steps = (p.k + T::depth - 1) / T::depth;
  const int begin = steps * part / parts, end = steps * (part + 1) / parts;

  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  if (warpgroup < kConsumers) {
    const int thread = threadIdx.x % kWarpgroup;
    typename T::Element::Sum sums[T::b_rows / 2];
#pragma unroll
    for (auto& sum : sums) sum = 0;
    typename T::Ring::State state;
    int previous = 0;
    for (int step = begin; step < end; ++step) {
      pipeline.wait(state);
      const uint64_t a =
          wgmma_descriptor(shared + state.stage * kABytes + warpgroup * kGroupTokens * kDepthBytes);
      const uint64_t b = wgmma_descriptor(shared + T::b_at + state.stage * T::b_bytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepthBytes / 32; ++i) {
        constexpr uint64_t step_of_32 = 32 / 16;
        T::Element::template multiply<T::b_rows>(sums, a + i * step_of_32, b + i * step_of_32);
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
    for (int i = 0; i < T::b_rows / 8; ++i) {
      const int pair = 4 * i + lane % 4;  // of rows of B
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t of_token = shared + (token + 8 * half) * T::pitch * 4;
        const float2 two = {static_cast<float>(sums[4 * i + 2 * half]),
                            static_cast<float>(sums[4 * i + 2 * half + 1])};
        if constexpr (T::Element::terms == 2) {
          const float2 scales = __ldg(p.scales + first_column + pair);
          store_shared(of_token + pair * 4, __fmaf_rn(two.y, scales.y, __fmul_rn(two.x, scales.x)));
        } else {
          store_shared(of_token + pair * 8, two);
        }
      }
    }
  } else if (lane == 0) {
    prefetch_tensor_map(a_map);
    prefetch_tensor_map(b_map);
    typename T::Ring::State state;
    for (int step = begin; step < end; ++step) {
      const uint32_t full = pipeline.acquire(state, kABytes + T::b_bytes);
      const int column = step * T::depth;
      tma_load_2d(a_map, full, shared + state.stage * kABytes, column, first_token);
      tma_load_2d(b_map, full, shared + T::b_at + state.stage * T::b_bytes, column,
                  T::Element::terms * first_column);
      state.advance();
    }
  }
  __syncwarp();
  cluster_sync();
  const int first = kTokens * part / parts, last = kTokens * (part + 1) / parts;
  const int count = (min(first_token + last, p.m) - first_token - first) * (T::columns / 2);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = first + i / (T::columns / 2), column = i % (T::columns / 2) * 2;
    const uint32_t address = shared + (token * T::pitch + column) * 4;
    float2 total = {0.0f, 0.0f};
    for (int block = 0; block < parts; ++block) {
      const float2 sums = load_shared(address, block);
      total = {total.x + sums.x, total.y + sums.y};
    }
    const int at = first_column + column;
    float2 factors = __ldg(reinterpret_cast<const float2*>(p.factors + at));
    if (p.a_scales) {
      const float of_token = __ldg(p.a_scales + first_token + token);
      factors = {factors.x * of_token, factors.y * of_token};
    }
    *reinterpret_cast<uint32_t*>(p.d + (first_token + token) * p.d_stride + at) =
        round2(total.x * factors.x, total.y * factors.y);
  }
  cluster_sync();  // no block leaves while others read its sums
#endif
}

// ---- Host

// Scales of rows, null where D leaves them out or the operands have none.
struct RowScales {
  const float* of_a;
  const float* of_b;
};

template <class T, class View>
void run(const View& a, const View& b, RowScales scales, const float* factors, const MatrixView& d,
         CudaStream stream) {
  const Parameters p{scales.of_a,
                     reinterpret_cast<const float2*>(scales.of_b),
                     factors,
                     static_cast<__nv_bfloat16*>(d.data),
                     d.rows > 1 ? d.row_stride : d.cols,
                     static_cast<int>(a.rows),
                     static_cast<int>(a.cols),
                     static_cast<int>(d.cols / T::columns)};
  const int64_t tiles = ceil_div(a.rows, kTokens) * p.column_tiles;
  const auto filled = static_cast<int64_t>(kFilled * multiprocessors(current_device()));
  const int64_t steps = ceil_div(a.cols, T::depth);
  const int64_t parts = std::clamp<int64_t>(filled / tiles, 1, std::min<int64_t>(steps, kMaxParts));
  launch_clusters(narrow_gemm_kernel<T>, checked_count(tiles), static_cast<uint32_t>(parts),
                  kThreads, T::shared_bytes, stream, operand_map(a, kTokens),
                  operand_map(b, T::b_rows), p);
}

template <class Element, class View>
void run_widest(const View& a, const View& b, RowScales scales, const float* factors,
                const MatrixView& d, CudaStream stream) {
  static_assert(kNarrowColumns == 32);
  if (d.cols % 128 == 0) return run<Tile<Element, 128>>(a, b, scales, factors, d, stream);
  if (d.cols % 64 == 0) return run<Tile<Element, 64>>(a, b, scales, factors, d, stream);
  run<Tile<Element, 32>>(a, b, scales, factors, d, stream);
}

}  // namespace

void narrow_gemm_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                      const float* factors, const MatrixView& d, CudaStream stream) {
  run_widest<E4M3>(a, b, {nullptr, b.scales}, factors, d, stream);
}

void narrow_gemm_sm90(const ConstInt8View& a, const ConstInt8View& b, const float* factors,
                      const MatrixView& d, CudaStream stream) {
  run_widest<Int8>(a, b, {a.scales, b.scales}, factors, d, stream);
}

void narrow_gemm_sm90(const ConstMatrixView& a, const ConstMatrixView& b, const float* factors,
                      const MatrixView& d, CudaStream stream) {
  run_widest<BF16>(a, b, {nullptr, nullptr}, factors, d, stream);
}

}  // namespace zimage_mxfp8::detail
