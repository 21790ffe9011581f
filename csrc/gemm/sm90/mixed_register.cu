// The kernel mixed_sm90 with weights decoded for each tile of tokens: D[M, N] = X[M, K] W[N, K]^T +
// bias[N].
//
// The tensor cores take BF16, and every MXFP8 number is a BF16 number (except for its range), so
// nothing is lost: weights stay 8 bits wide until they reach registers, where they are decoded into
// the operand that wgmma takes from there. That makes W the left operand and the result D^T; tiles
// are `tokens` wide and 64 weights high for each row group.
//
// A warp copies tiles of X, W and scales into a ring of stages; warpgroups take them from there,
// and decode the weights of a stage while the tensor cores multiply those of the one before. Row
// groups share a tile of X, each with 64 weights of its own. With many tokens blocks run from tile
// to tile. With few tokens there are too few tiles for all multiprocessors: K groups take stages in
// turn, blocks of a cluster split K, and at the end each adds the sums of some of the tokens.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/cluster.cuh"
#include "cuda/sm90/mbarrier.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/registers.cuh"
#include "cuda/sm90/scheduler.cuh"
#include "cuda/sm90/shared_memory.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/tma.cuh"
#include "cuda/sm90/wgmma.cuh"
#include "gemm/dispatch/heuristics.h"
#include "gemm/sm90/decode_bf16.cuh"
#include "gemm/sm90/mixed.h"
#include "gemm/sm90/transposed_tile.cuh"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kDepth = 128;      // of K in a stage: as much as a tile of scales covers
constexpr int kHalf = 64;        // of K in a tile of X: 128 bytes, as wide as a swizzle
constexpr int kScaleTile = 512;  // bytes: the scales of 128 weights and 128 of K

// A variant of the kernel.
template <int tokens_, int row_groups_, int k_groups_, int multicast_, int split_, int stages_>
struct Variant {
  static constexpr int tokens = tokens_;          // width of a tile
  static constexpr int row_groups = row_groups_;  // warpgroups with 64 weights each
  static constexpr int k_groups = k_groups_;      // warpgroups that take stages in turn
  static constexpr int multicast = multicast_;    // blocks that share tiles of X
  static constexpr int split = split_;            // blocks that split K; each has one tile only
  static constexpr int stages = stages_;
  static constexpr int cluster = multicast * split;
  static_assert(multicast == 1 || split == 1);
  // A warpgroup must wait for every phase of the barriers that it uses (see Pipeline).
  static_assert(stages % k_groups == 0);

  static constexpr int consumers = row_groups * k_groups;
  static constexpr int threads = (consumers + 1) * kWarpgroup;
  // A single consumer has enough registers from the start.
  static constexpr bool hands_over = consumers == 2;
  using Registers = RegisterSplit<2, 232>;
  using Ring = Pipeline<stages, row_groups, multicast>;
  static constexpr int weights = row_groups * kGroupWeights;
  static constexpr int sums = tokens / 2;  // a thread's share of a warpgroup's tile

  static constexpr int x_bytes = tokens * kDepth * 2;
  static constexpr int w_bytes = weights * kDepth;
  static constexpr int stage_bytes = x_bytes + w_bytes + kScaleTile;
  static constexpr int out_buffers = 3;  // of a warpgroup
  static constexpr int sum_bytes = row_groups * kWarpgroup * sums * 4;
  // Each block that splits K adds the sums of a part of the tile's tokens.
  static constexpr int part_tokens = tokens / split;
  static constexpr int part_bytes = sum_bytes / split;
  static_assert(part_tokens % 16 == 0);

  static constexpr int w_at = stages * x_bytes;
  static constexpr int out_at = w_at + stages * w_bytes;
  static constexpr int scales_at = out_at + row_groups * out_buffers * kOutBytes;
  static constexpr int sums_at = scales_at + stages * kScaleTile;
  static constexpr int parts_at = sums_at + (k_groups - 1) * sum_bytes;
  static constexpr int barriers_at = parts_at + (split - 1) * part_bytes;
  static constexpr int shared_bytes = barriers_at + Ring::Barriers::bytes + kTmaAlignment;
  static_assert(shared_bytes <= 232448);
  static_assert(x_bytes % kTmaAlignment == 0 && w_bytes % kTmaAlignment == 0 &&
                kOutBytes % kTmaAlignment == 0);
};

struct Parameters {
  const uint8_t* scales;
  const __nv_bfloat16* bias;
  int n;
  int k_steps;           // of kDepth; also the scale tiles of a row of such tiles
  int scale_rows;        // rows of scale tiles
  int m_tiles, n_tiles;  // tiles of tokens, and of weights (those that share X count as one)
};

// A thread's part of 64 weights and kDepth of K, as wgmma takes it: steps of 16.
constexpr int kSteps = kDepth / 16;
using Fragments = uint32_t[kSteps][4];

// `codes` is the warpgroup's part of a W tile in shared memory, `row` the thread's first of 64,
// `scales` the scale tile and `scale_row` the row in it.
__device__ void load_fragments(Fragments& fragments, uint32_t codes, int row, uint32_t scales,
                               int scale_row) {
  const int lane = threadIdx.x % 32;
  const auto load2 = [](uint32_t address) {
    uint16_t value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
    return uint32_t{value};
  };
  uint32_t bytes[2];  // of the rows: the scales of four blocks of 32
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = scale_row + 8 * i;
    asm volatile("ld.shared.u32 %0, [%1];"
                 : "=r"(bytes[i])
                 : "r"(scales + at % 32 * 16 + at / 32 * 4));
  }
  // TMA's swizzle of 128 bytes: pieces of 16 bytes, exclusive-or with the number of the row.
  const uint32_t swizzle = row % 8;
  const uint32_t base = codes + row * kDepth + lane % 4 * 2;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t at = base + (step ^ swizzle) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t scale = scale_pair(bytes[i % 2] >> step / 2 * 8 & 0xFF);
      const uint32_t codes2 = load2(at + i % 2 * 8 * kDepth + i / 2 * 8);
      fragments[step][i] = multiply_bf16(decode_pair(codes2), scale);
    }
  }
  // A byte of kFirstSplitByte or more: its high bit is set, and its lower bits exceed 6.
  const auto has_split = [](uint32_t word) {
    return (word & ((word & 0x7F7F7F7F) + 0x79797979) & 0x80808080) != 0;
  };
  if (has_split(bytes[0]) || has_split(bytes[1])) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragments[step][i] =
            multiply_bf16(fragments[step][i], rest_pair(bytes[i % 2] >> step / 2 * 8 & 0xFF));
      }
    }
  }
}

// Sums go from thread to thread through shared memory, in pieces of 16 bytes that are kWarpgroup
// pieces apart. They are given to a block of the cluster, and added by the one that received them.
template <int count, int all>
__device__ void store_accumulators(const float (&sums)[all], int first, uint32_t to,
                                   uint32_t block) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float* const four = sums + first + i;
    store_shared(to + i * kWarpgroup * 4, block, make_float4(four[0], four[1], four[2], four[3]));
  }
}

template <int count>
__device__ void add_sums(float (&sums)[count], uint32_t from) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float4 four = load_shared(from + i * kWarpgroup * 4);
    sums[i] += four.x;
    sums[i + 1] += four.y;
    sums[i + 2] += four.z;
    sums[i + 3] += four.w;
  }
}

// The first token and weight of a block's tile.
struct Tile {
  int token, weight;
};

template <class V>
__device__ Tile tile_of(const TileIndex& at, int block) {
  const int weights = at.n * V::multicast + (V::multicast > 1 ? block : 0);
  return {at.m * V::tokens, weights * V::weights};
}

template <class V>
__global__ void __launch_bounds__(V::threads, 1)
    each_kernel(const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ CUtensorMap d_map, const Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  extern __shared__ uint8_t unaligned[];
  const uint32_t shared = tma_aligned(unaligned);
  const uint32_t x_tiles = shared, w_tiles = shared + V::w_at, scale_tiles = shared + V::scales_at;
  const int block = V::cluster > 1 ? block_of_cluster() : 0;
  const typename V::Ring pipeline{{shared + V::barriers_at}, block};
  const int group = threadIdx.x / kWarpgroup;  // the last one copies

  if (threadIdx.x == V::consumers * kWarpgroup) {
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(w_map);
  }
  if (threadIdx.x == 0) {
    pipeline.init();
    mbarrier_init_fence();
  }
  if constexpr (V::split > 1) cluster_arrive();  // awaited before sums are given
  if constexpr (V::multicast > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  await_predecessors();
  const TileScheduler<ColumnOrder, V::cluster> scheduler(ColumnOrder{p.m_tiles, p.n_tiles});
  // This block's part of K.
  const int steps_each = (p.k_steps + V::split - 1) / V::split;
  const int first_step = V::split > 1 ? min(block * steps_each, p.k_steps) : 0;
  const int steps = min(steps_each, p.k_steps - first_step);

  if (group == V::consumers) {
    if constexpr (V::hands_over) V::Registers::begin_producer();
    if (threadIdx.x % kWarpgroup == 0) {
      typename V::Ring::State state;
      for (const TileIndex at : scheduler) {
        const Tile tile = tile_of<V>(at, block);
        // Beyond the last weight only zeros are copied, and any scales will do.
        const int scale_row = min(tile.weight / 128, p.scale_rows - 1);
        for (int step = first_step; step < first_step + steps; ++step) {
          const uint32_t full = pipeline.acquire(state, V::stage_bytes);
          for (int half = 0; half < 2; ++half) {
            const int k = step * kDepth + half * kHalf;
            const uint32_t x = x_tiles + state.stage * V::x_bytes + half * V::tokens * kHalf * 2;
            if constexpr (V::multicast > 1) {
              constexpr int part = V::tokens / V::multicast;
              tma_load_2d_multicast(x_map, full, x + block * part * kHalf * 2, k,
                                    tile.token + block * part, (1 << V::multicast) - 1);
            } else {
              tma_load_2d(x_map, full, x, k, tile.token);
            }
          }
          tma_load_2d(w_map, full, w_tiles + state.stage * V::w_bytes, step * kDepth, tile.weight);
          tma_load_1d(p.scales + (int64_t(scale_row) * p.k_steps + step) * kScaleTile, full,
                      scale_tiles + state.stage * kScaleTile, kScaleTile);
          state.advance();
        }
      }
    }
    __syncwarp();
    if constexpr (V::split > 1) {  // as the others do
      cluster_wait();
      cluster_sync();
    }
  } else {
    if constexpr (V::hands_over) V::Registers::begin_consumer();
    const int row_group = group % V::row_groups, k_group = group / V::row_groups;
    const int thread = threadIdx.x % kWarpgroup;
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float sums[V::sums];
    Fragments fragments[2];
    uint32_t done = 0;    // steps of the tiles before this one
    int next_buffer = 0;  // for D
    const auto decode = [&](Fragments& to, int step, int weight) {
      const uint32_t position = done + step, stage = pipeline.stage_at(position);
      pipeline.wait_at(position);
      load_fragments(to, w_tiles + stage * V::w_bytes + row_group * kGroupWeights * kDepth, row,
                     scale_tiles + stage * kScaleTile, weight % 128 + row);
    };
    // Multiplies a step while it decodes the next one, if there is one.
    const auto multiply = [&](Fragments& current, Fragments& next, int step, int weight) {
      const uint32_t stage = pipeline.stage_at(done + step);
      const uint64_t x = wgmma_descriptor(x_tiles + stage * V::x_bytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        constexpr uint64_t half = V::tokens * kHalf * 2 / 16, step_of_16 = 16 * 2 / 16;
        Wgmma<V::tokens>::multiply(sums, current[i], x + i / 4 * half + i % 4 * step_of_16);
      }
      wgmma_commit();
      if (step + V::k_groups < steps) decode(next, step + V::k_groups, weight);
      wgmma_wait(sums);
      pipeline.release(stage, thread);
    };
    // Sums that a warpgroup receives: where a thread finds its own.
    const auto received = [&](int at, int count) {
      return shared + at + (row_group * (count / 4) * kWarpgroup + thread) * 16;
    };

    for (const TileIndex at : scheduler) {
      Tile tile = tile_of<V>(at, block);
      tile.weight += row_group * kGroupWeights;
#pragma unroll
      for (int i = 0; i < V::sums; ++i) sums[i] = 0.0f;
      if (k_group < steps) decode(fragments[0], k_group, tile.weight);
      for (int step = k_group; step < steps; step += 2 * V::k_groups) {
        multiply(fragments[0], fragments[1], step, tile.weight);
        if (step + V::k_groups < steps) {
          multiply(fragments[1], fragments[0], step + V::k_groups, tile.weight);
        }
      }
      done += steps;

      if constexpr (V::k_groups > 1) {
        const auto from = [&](int other) {
          return received(V::sums_at + other * V::sum_bytes, V::sums);
        };
        if (k_group > 0) store_accumulators<V::sums>(sums, 0, from(k_group - 1), block);
        named_barrier(1, V::consumers * kWarpgroup);
        if (k_group == 0) {
          for (int other = 0; other < V::k_groups - 1; ++other) add_sums(sums, from(other));
        }
      }
      const uint32_t out = shared + V::out_at + row_group * V::out_buffers * kOutBytes;
      const BiasPair bias = load_bias(p.bias, tile.weight, p.n);
      if constexpr (V::split > 1) {
        const auto from = [&](int other) {
          return received(V::parts_at + other * V::part_bytes, V::sums / V::split);
        };
        float part[V::sums / V::split];
        cluster_wait();  // the other blocks have begun
#pragma unroll
        for (int of = 0; of < V::split; ++of) {
          if (of == block) {
#pragma unroll
            for (int i = 0; i < V::sums / V::split; ++i)
              part[i] = sums[of * V::sums / V::split + i];
          } else if (k_group == 0) {
            store_accumulators<V::sums / V::split>(sums, of * V::sums / V::split,
                                                   from(block - (block > of)), of);
          }
        }
        cluster_sync();
        if (k_group == 0) {
          for (int other = 0; other < V::split - 1; ++other) add_sums(part, from(other));
          store_tile<V::part_tokens, V::out_buffers>(d_map, part, bias,
                                                     tile.token + block * V::part_tokens,
                                                     tile.weight, out, next_buffer, 2 + row_group);
        }
        break;
      } else if (k_group == 0) {
        store_tile<V::tokens, V::out_buffers>(d_map, sums, bias, tile.token, tile.weight, out,
                                              next_buffer, 2 + row_group);
      }
    }
    if (thread == 0) tma_store_wait_read();
  }
  // No block leaves while another may still write to its shared memory.
  if constexpr (V::multicast > 1) cluster_sync();
#endif
}

// ---- Host

template <class V>
void run(const GemmTask& task, CudaStream stream) {
  const CUtensorMap x_map =
      bf16_map(task.a.codes, task.m, task.k, task.a.row_stride, V::tokens / V::multicast);
  const CUtensorMap w_map = tensor_map(task.b.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, task.n,
                                       task.k, task.k, V::weights);
  const CUtensorMap d_map =
      bf16_map(task.d, task.m, task.n, task.d_row_stride, out_tokens(V::part_tokens));
  Parameters p{};
  p.scales = static_cast<const uint8_t*>(task.b.scales);
  p.bias = static_cast<const __nv_bfloat16*>(task.bias);
  p.n = static_cast<int>(task.n);
  p.k_steps = static_cast<int>(ceil_div(task.k, kDepth));
  p.scale_rows = static_cast<int>(ceil_div(task.n, 128));
  p.m_tiles = static_cast<int>(ceil_div(task.m, V::tokens));
  p.n_tiles = static_cast<int>(ceil_div(task.n, V::weights * V::multicast));

  int64_t clusters = int64_t{p.m_tiles} * p.n_tiles;
  if (V::split == 1) {
    clusters = std::min<int64_t>(clusters, multiprocessors(current_device()) / V::cluster);
  }
  launch_clusters(each_kernel<V>, checked_count(clusters), V::cluster, V::threads, V::shared_bytes,
                  stream, x_map, w_map, d_map, p);
}

using Few32 = Variant<32, 1, 2, 1, 2, 8>;
using Few64 = Variant<64, 1, 1, 1, 2, 8>;
using Few64Wide = Variant<64, 2, 1, 1, 1, 5>;
using Few128 = Variant<128, 1, 1, 1, 2, 4>;
using Few128Wide = Variant<128, 2, 1, 1, 1, 4>;
using Many = Variant<192, 2, 1, 2, 1, 3>;

}  // namespace

void mixed_register_sm90(const GemmTask& task, CudaStream stream) {
  switch (mixed_register_tile(task.m, task.n, multiprocessors(current_device()))) {
    case MixedRegisterTile::k32x64:
      return run<Few32>(task, stream);
    case MixedRegisterTile::k64x64:
      return run<Few64>(task, stream);
    case MixedRegisterTile::k64x128:
      return run<Few64Wide>(task, stream);
    case MixedRegisterTile::k128x64:
      return run<Few128>(task, stream);
    case MixedRegisterTile::k128x128:
      return run<Few128Wide>(task, stream);
    case MixedRegisterTile::k192x128:
      return run<Many>(task, stream);
  }
}

}  // namespace zimage_mxfp8::detail
