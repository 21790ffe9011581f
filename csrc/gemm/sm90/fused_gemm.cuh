// GEMMs of 8-bit operands on Hopper, fused with the DiT's next operation.
//
// D = A B^T in tiles of 128 tokens and 256 or 192 rows of B, from tile to tile. In a block
// - a thread copies tiles of A and B into a ring of stages;
// - two warpgroups multiply, 64 tokens each, and leave BF16 of their sums in shared memory;
// - three warps read them from there and apply the epilogue: they have the time of a whole tile,
//   while the tensor cores work on the next one.
//
// Two blocks with tokens of their own share the tiles of B; fused_order.h has the exceptions. Where
// only 64 tokens are left, a block computes two tiles, one warpgroup after the other.
//
// An Element says how codes are multiplied and how sums become BF16:
//   Sum       of products: float or int32_t
//   Scaling   what is left to the epilogue
//   multiply(sums, a, b, add)                           32 columns of A and B
//   scaled(sums, operands, epilogue, token, tile)       a function of i: the value of sum i, of a
//                                                       warp whose first token is `token`
//
// With a low-rank addend X U^T, X and U are BF16. Their stages of 64 columns, which have as many
// bytes as those of A and B, follow in the same ring, and their products add to the values: to
// float sums as they are, to integers once they are scaled.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/sm90/cluster.cuh"
#include "cuda/sm90/mbarrier.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/scheduler.cuh"
#include "cuda/sm90/shared_memory.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/tma.cuh"
#include "cuda/sm90/wgmma.cuh"
#include "gemm/sm90/fused_epilogues.cuh"
#include "gemm/sm90/fused_order.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail::fused_gemm {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kEpilogueWarps = 3;  // the warp before them copies

constexpr int kCluster = kFusedCluster;
constexpr int kTokens = kConsumers * kGroupTokens;
constexpr int kBoxTokens = kTokens / kCluster;  // that a block loads at once
constexpr int kDepth = 128;                     // of K in a stage: as wide as TMA's swizzle
static_assert(kTokens == kFusedTileM && kWideRows == kFusedTileN);
static_assert(kBoxTokens == kGroupTokens);  // a half of a tile is a box
constexpr int kABytes = kTokens * kDepth;
constexpr int kWarps = kConsumers * 4;  // that multiply
using SumBarriers = BarrierPairs<kWarps>;

// Shared memory with tiles of `rows` rows of B.
template <int rows>
struct Memory {
  static constexpr int kStages = rows > 192 ? 3 : 4;
  using Ring = Pipeline<kStages, kConsumers, kCluster>;
  static constexpr int kBBytes = rows * kDepth;
  static constexpr int kBoxes = rows / kBoxColumns;
  static constexpr int kBAt = kStages * kABytes;
  static constexpr int kOutAt = kBAt + kStages * kBBytes;
  static constexpr int kBarriersAt = kOutAt + kConsumers * kBoxes * kBoxBytes;
  static constexpr int kSumBarriersAt = kBarriersAt + Ring::Barriers::bytes;
  static constexpr int kBytes = kSumBarriersAt + SumBarriers::bytes + kTmaAlignment;
  static_assert(kBytes <= 232448);
  static_assert(kABytes / kCluster % kTmaAlignment == 0 && kBBytes / 2 % kTmaAlignment == 0 &&
                kBoxBytes % kTmaAlignment == 0 && rows % kBoxColumns == 0);
};

// The tiles of the cluster's blocks, as TileScheduler takes them.
struct BlockOrder {
  FusedOrder order;
  int block;

  __device__ int tiles() const { return static_cast<int>(order.units()); }
  __device__ FusedTile at(int unit) const { return order.at(unit, block); }
};

// The first token and the column of tiles of a warp that multiplies.
__device__ inline int token_of(const FusedTile& tile, int warp) {
  return tile.m * kTokens + (tile.is_half ? warp % 4 : warp) * kWarpTokens;
}
__device__ inline int column_of(const FusedTile& tile, int warp) {
  return tile.n + (tile.is_half ? warp / 4 : 0);
}

template <class Epilogue>
struct Parameters {
  Epilogue epilogue;
  Operands operands;
  FusedOrder order;
  int addend_steps;  // stages of the addend
};

// How wide a low-rank addend is: a multiple of a stage's columns, or half of them more. The
// compiler serializes the multiplications of a kernel that decides that while it runs.
enum class Addend { kNone, kWhole, kEndsHalf };

constexpr std::true_type kWholeStage;
constexpr std::false_type kHalfStage;

// Multiplies half of a stage and adds to the sums, which a tile's first stage begins.
template <class Element, int count>
__device__ void multiply(typename Element::Sum (&sums)[count], uint64_t a, uint64_t b, int half,
                         bool first) {
  constexpr uint64_t step_of_32 = 32 / 16;
#pragma unroll
  for (int i = 2 * half; i < 2 * half + 2; ++i) {
    Element::multiply(sums, a + i * step_of_32, b + i * step_of_32, !(first && i == 0));
  }
  wgmma_commit();
}

// The same of the addend, half of 64 columns of BF16. Integers hold the bits of floats.
template <typename Sum, int count>
__device__ void multiply_addend(Sum (&sums)[count], uint64_t a, uint64_t b, int half) {
  using Wgmma = std::conditional_t<std::is_same_v<Sum, float>, WgmmaShared<2 * count>,
                                   WgmmaSharedBits<2 * count>>;
  constexpr uint64_t step_of_16 = 32 / 16;
#pragma unroll
  for (int i = 2 * half; i < 2 * half + 2; ++i) {
    Wgmma::multiply(sums, a + i * step_of_16, b + i * step_of_16);
  }
  wgmma_commit();
}

// Leaves values of a warp's 16 tokens in its boxes, rounded. value(i) is the sum i of the thread
// (see wgmma.cuh), scaled or not.
template <int rows, class Value>
__device__ void store_values(SmemTile boxes, Value value) {
  // Four 8x8 matrices at a time: eight tokens and those 8 below, two groups of eight columns.
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < rows / 8; i += 2) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = round2(value(4 * i + 2 * w), value(4 * i + 2 * w + 1));
    store_matrices(boxes.piece(row, i / 8, i % 8 + matrix / 2), words);
  }
}

template <class Element, class Epilogue, Addend addend>
__global__ void __launch_bounds__(kThreads, 1)
    fused_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map,
                      const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ CUtensorMap u_map,
                      const __grid_constant__ CUtensorMap d_map, const Parameters<Epilogue> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kRows = Epilogue::kRows;
  using Layout = Memory<kRows>;
  using Ring = typename Layout::Ring;
  constexpr int kBBytes = Layout::kBBytes;
  launch_dependents();
  extern __shared__ uint8_t unaligned[];
  const uint32_t shared = tma_aligned(unaligned);
  const uint32_t a_tiles = shared, b_tiles = shared + Layout::kBAt;
  // For each warp: full when its sums are in its boxes, empty when they have been taken.
  const SumBarriers sum_barriers{shared + Layout::kSumBarriersAt};
  const auto boxes_of = [&](int warp) {
    return SmemTile{shared + Layout::kOutAt + warp / 4 * Layout::kBoxes * kBoxBytes +
                    warp % 4 * kWarpTokens * kBoxColumns * 2};
  };
  const int block = block_of_cluster();
  const Ring pipeline{{shared + Layout::kBarriersAt}, block};
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    pipeline.init();
    sum_barriers.init(1, 1);
    mbarrier_init_fence();
  }
  cluster_sync();
  await_predecessors();
  const TileScheduler<BlockOrder, kCluster> scheduler({p.order, block});
  const int steps = (p.operands.k + kDepth - 1) / kDepth;

  if (warpgroup < kConsumers) {
    const int thread = threadIdx.x % kWarpgroup, warp = threadIdx.x / 32;
    typename Ring::State state;
    uint32_t empty_phase = 1;  // all boxes are empty at first
    // Takes no part in the stages of a tile of the other warpgroup. One warp releases a stage for
    // all, and none may be a lap of the ring behind.
    const auto skip_stages = [&] {
      for (int step = 0; step < steps + p.addend_steps; ++step) {
        pipeline.wait(state);
        named_barrier(1 + warpgroup, kWarpgroup);
        pipeline.release(state.stage, thread);
        state.advance();
      }
    };
    for (const FusedTile at : scheduler) {
      if (at.is_half && warpgroup > 0) skip_stages();
      const uint32_t own_tokens = at.is_half ? 0 : warpgroup * kGroupTokens * kDepth;
      typename Element::Sum sums[kRows / 2];
      int previous = 0;
      // Multiplies a stage, or the first half of it. The one before is released as soon as it has
      // been read, while the tensor cores have work.
      const auto multiply_stage = [&](bool first, auto whole, auto multiply_half) {
        pipeline.wait(state);
        const uint64_t a = wgmma_descriptor(a_tiles + state.stage * kABytes + own_tokens);
        const uint64_t b = wgmma_descriptor(b_tiles + state.stage * kBBytes);
        wgmma_fence();
        multiply_half(a, b, 0);
        wgmma_wait_pending<1>();
        if (!first) pipeline.release(previous, thread);
        if constexpr (whole) multiply_half(a, b, 1);
        previous = state.stage;
        state.advance();
      };
      for (int step = 0; step < steps; ++step) {
        multiply_stage(step == 0, kWholeStage, [&](uint64_t a, uint64_t b, int half) {
          multiply<Element>(sums, a, b, half, step == 0 && half == 0);
        });
      }
      const auto scaled = [&] {
        return Element::scaled(sums, p.operands, p.epilogue, token_of(at, warp),
                               column_of(at, warp));
      };
      // Adds the products of the addend's stages; `first` if no stage before is to be released.
      const auto add = [&](bool first) {
        const auto multiply_columns = [&](uint64_t a, uint64_t b, int half) {
          multiply_addend(sums, a, b, half);
        };
        constexpr bool ends_half = addend == Addend::kEndsHalf;
        for (int step = ends_half ? 1 : 0; step < p.addend_steps; ++step) {
          multiply_stage(first, kWholeStage, multiply_columns);
          first = false;
        }
        if constexpr (ends_half) multiply_stage(first, kHalfStage, multiply_columns);
      };
      const auto store = [&](auto value) {
        mbarrier_wait(sum_barriers.empty(warp), empty_phase);
        empty_phase ^= 1;
        store_values<kRows>(boxes_of(warp), value);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(sum_barriers.full(warp));
      };
      constexpr bool is_float = std::is_same_v<typename Element::Sum, float>;
      if constexpr (addend != Addend::kNone && is_float) add(false);
      wgmma_wait(sums);
      pipeline.release(previous, thread);
      if constexpr (addend != Addend::kNone && !is_float) {
        const auto value = scaled();
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) sums[i] = __float_as_int(value(i));
        add(true);
        wgmma_wait(sums);
        pipeline.release(previous, thread);
        store([&](int i) { return __int_as_float(sums[i]); });
      } else {
        store(scaled());
      }
      if (at.is_half && warpgroup == 0) skip_stages();
    }
  } else {
    const int epilogue_warp = threadIdx.x % kWarpgroup / 32 - 1;
    if (epilogue_warp >= 0) {
      uint32_t full_phase = 0;
      for (const FusedTile at : scheduler) {
#pragma unroll 1
        for (int warp = epilogue_warp; warp < kWarps; warp += kEpilogueWarps) {
          const int token = token_of(at, warp), column = column_of(at, warp);
          const SmemTile boxes = boxes_of(warp);
          mbarrier_wait(sum_barriers.full(warp), full_phase);
          p.epilogue(boxes, p.operands, token, column);
          tma_store_fence();
          __syncwarp();
          if (lane == 0) {
            for (int box = 0; box < Epilogue::kColumns / kBoxColumns; ++box) {
              tma_store_2d(d_map, boxes.address + box * kBoxBytes,
                           column * Epilogue::kColumns + box * kBoxColumns, token);
            }
            tma_store_commit();
            tma_store_wait_read();
            mbarrier_arrive(sum_barriers.empty(warp));
          }
          __syncwarp();
        }
        full_phase ^= 1;
      }
    } else if (lane == 0) {
      prefetch_tensor_map(a_map);
      prefetch_tensor_map(b_map);
      typename Ring::State state;
      const auto load_tile = [&](const FusedTile& at, int n) {
        const int token = at.m * kTokens;
        const int b_rows[2] = {p.epilogue.row_of_b(n, 0), p.epilogue.row_of_b(n, 1)};
        const int own_b_rows = p.epilogue.row_of_b(n, block);
        const int a_bytes = at.is_half ? kABytes / 2 : kABytes;
        const auto load = [&](const CUtensorMap& of_a, const CUtensorMap& of_b, int column) {
          const uint32_t full = pipeline.acquire(state, a_bytes + kBBytes);
          const uint32_t a = a_tiles + state.stage * kABytes, b = b_tiles + state.stage * kBBytes;
          constexpr uint16_t both = (1 << kCluster) - 1;
          if (at.is_half) {
            if (state.stage % kCluster == block) {
              tma_load_2d_multicast(of_a, full, a, column, token, both);
            }
          } else if (at.shares_tokens) {
            tma_load_2d_multicast(of_a, full, a + block * kBoxTokens * kDepth, column,
                                  token + block * kBoxTokens, both);
          } else {
            tma_load_2d(of_a, full, a, column, token);
            tma_load_2d(of_a, full, a + kBoxTokens * kDepth, column, token + kBoxTokens);
          }
          if (at.shares_tokens) {
            tma_load_2d(of_b, full, b, column, b_rows[0]);
            tma_load_2d(of_b, full, b + kBBytes / 2, column, b_rows[1]);
          } else {
            tma_load_2d_multicast(of_b, full, b + block * kBBytes / 2, column, own_b_rows, both);
          }
          state.advance();
        };
        for (int step = 0; step < steps; ++step) load(a_map, b_map, step * kDepth);
        if constexpr (addend != Addend::kNone) {
          for (int step = 0; step < p.addend_steps; ++step) load(x_map, u_map, step * kDepth / 2);
        }
      };
      for (const FusedTile at : scheduler) {
        for (int i = 0; i < (at.is_half ? 2 : 1); ++i) load_tile(at, at.n + i);
      }
    }
    __syncwarp();
  }
  // No block leaves while the other may still write to its shared memory.
  cluster_sync();
#endif
}

// `addend` may be null unless the epilogue is only there to scale sums with one. `a` and `b` are
// operands that operand_map() describes.
template <class Element, class Operand, class Epilogue>
void run(const Operand& a, const Operand& b, const Epilogue& epilogue, const LowRankAddend* addend,
         const MatrixView& target, CudaStream stream) {
  Parameters<Epilogue> p{};
  p.epilogue = epilogue;
  p.operands = {a.scales, b.scales, static_cast<int>(a.rows), static_cast<int>(b.rows),
                static_cast<int>(a.cols)};
  int64_t clusters = multiprocessors(current_device()) / kCluster;
  p.order = fused_order(a.rows, ceil_div(target.cols, Epilogue::kColumns), clusters);
  clusters = std::min<int64_t>(clusters, checked_count(p.order.units()));
  const int64_t row_stride = target.rows > 1 ? target.row_stride : target.cols;
  const CUtensorMap a_map = operand_map(a, kBoxTokens), b_map = operand_map(b, Epilogue::kRows / 2);
  const CUtensorMap d_map =
      bf16_map(target.data, target.rows, target.cols, row_stride, kWarpTokens);
  const auto start = [&](auto kernel, const CUtensorMap& x_map, const CUtensorMap& u_map) {
    launch_clusters(kernel, static_cast<uint32_t>(clusters), kCluster, kThreads,
                    Memory<Epilogue::kRows>::kBytes, stream, a_map, b_map, x_map, u_map, d_map, p);
  };
  // Float sums that are only scaled come from a library's kernel, unless there is an addend.
  if constexpr (!std::is_same_v<Epilogue, Scale<ScaleValues, Epilogue::kRows>>) {
    if (!addend) {
      return start(fused_gemm_kernel<Element, Epilogue, Addend::kNone>, a_map, b_map);
    }
  }
  constexpr int kColumns = kDepth / 2;  // of BF16 in a stage
  p.addend_steps = static_cast<int>(ceil_div(addend->x.cols, kColumns));
  const CUtensorMap x_map = operand_map(addend->x, kBoxTokens),
                    u_map = operand_map(addend->u, Epilogue::kRows / 2);
  if (p.addend_steps * kColumns - addend->x.cols < kColumns / 2) {
    start(fused_gemm_kernel<Element, Epilogue, Addend::kWhole>, x_map, u_map);
  } else {
    start(fused_gemm_kernel<Element, Epilogue, Addend::kEndsHalf>, x_map, u_map);
  }
}

// The same with each epilogue of gemm.h. `rows` of B are in a tile.
template <class Element, int rows = kWideRows, class Operand>
void run_scale(const Operand& a, const Operand& b, const LowRankAddend* addend,
               const MatrixView& target, CudaStream stream) {
  run<Element>(a, b, Scale<typename Element::Scaling, rows>{}, addend, target, stream);
}

template <class Element, class Operand>
void run_silu_multiply(const Operand& a, const Operand& b, const LowRankAddend* addend,
                       const MatrixView& target, CudaStream stream) {
  const SiluMultiply<typename Element::Scaling> epilogue{static_cast<int>(target.cols)};
  run<Element>(a, b, epilogue, addend, target, stream);
}

template <class Element, class Operand>
void run_rotate_heads(const Operand& a, const Operand& b, const zimage_mxfp8::RotateHeads& heads,
                      const LowRankAddend* addend, const MatrixView& target, CudaStream stream) {
  const RotateHeads<typename Element::Scaling> epilogue{
      static_cast<const uint4*>(heads.q_weight),
      static_cast<const uint4*>(heads.k_weight),
      static_cast<const float4*>(heads.rotations.data),
      heads.rotations.row_stride / 4,
      static_cast<int>(heads.q_heads),
      static_cast<int>(heads.q_heads + heads.k_heads),
      heads.eps};
  run<Element>(a, b, epilogue, addend, target, stream);
}

}  // namespace zimage_mxfp8::detail::fused_gemm
