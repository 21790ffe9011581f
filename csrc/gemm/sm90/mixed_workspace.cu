// The kernel mixed_sm90 with each weight decoded once, to the workspace, while it multiplies.
//
// Each block computes D^T = W X^T tile after tile, with both operands in shared memory. In a block
// - warpgroups multiply, 64 weights each;
// - a warp copies tiles of X and of decoded weights into a ring of stages;
// - the other warps of its warpgroup decode weights to the workspace, ahead of the copies, while
//   the tensor cores are busy; the copies still find the decoded weights in the cache.
//
// Two blocks with weights of their own share the tiles of X. All blocks work on few rows of W at a
// time, a group, with all tokens, and groups are decoded in that order. Weights are decoded in
// units, which decoders claim in order. A claimed unit waits only for the tiles of its own block,
// and those wait for earlier units only; so the kernel completes, whichever of its blocks are
// resident.
//
// The stages of a low-rank addend, which is BF16 too, follow the product's in the same ring.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/cluster.cuh"
#include "cuda/sm90/mbarrier.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/registers.cuh"
#include "cuda/sm90/scheduler.cuh"
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

constexpr int kCluster = 2;      // blocks that share tiles of X
constexpr int kTokens = 192;     // width of a tile
constexpr int kDepth = 64;       // of K in a stage: 128 bytes, as wide as TMA's swizzle
constexpr int kScaleTile = 512;  // bytes: the scales of 128 weights and 128 of K
// The unit that a warp decodes at a time.
constexpr int kUnitRows = 16, kUnitDepth = 128;
// The columns of W are decoded in at most this many chunks: one lane watches each.
constexpr int kMaxChunks = 32;
constexpr int kGroupsAhead = 1;  // decoded before a block needs them

// A variant of the kernel: how high a tile is.
template <int consumers_, int stages_, int out_buffers_>
struct Variant {
  static constexpr int consumers = consumers_;  // warpgroups that multiply
  static constexpr int stages = stages_;
  static constexpr int out_buffers = out_buffers_;  // of a warpgroup

  static constexpr int threads = (consumers + 1) * kWarpgroup;
  static constexpr int weights = consumers * kGroupWeights;  // height of a tile
  static constexpr int slab = kCluster * weights;            // rows of W of two tiles
  using Registers = RegisterSplit<consumers, consumers == 2 ? 208 : 136>;
  using Ring = Pipeline<stages, consumers, kCluster>;

  static constexpr int x_bytes = kTokens * kDepth * 2;
  static constexpr int w_bytes = weights * kDepth * 2;
  static constexpr int w_at = stages * x_bytes;
  static constexpr int out_at = w_at + stages * w_bytes;
  static constexpr int barriers_at = out_at + consumers * out_buffers * kOutBytes;
  static constexpr int group_at = barriers_at + Ring::Barriers::bytes;
  static constexpr int shared_bytes = group_at + 4 + kTmaAlignment;
  static_assert(shared_bytes <= 232448);
  static_assert(x_bytes / kCluster % kTmaAlignment == 0 && w_bytes % kTmaAlignment == 0 &&
                kOutBytes % kTmaAlignment == 0);
};

struct Parameters {
  const uint8_t* codes;
  const uint8_t* scales;
  const __nv_bfloat16* bias;
  __nv_bfloat16* weights;  // in the workspace: W decoded
  uint32_t* ready;         // [slabs][kMaxChunks]: units decoded
  uint32_t* claimed;       // units
  int n, k;
  int m_tiles;       // tiles of tokens
  int slabs;         // of W
  int group_slabs;   // slabs of a group
  int chunks;        // of K in a slab, each of chunk_depth
  int chunk_depth;   // a multiple of kUnitDepth
  int addend_steps;  // stages of the addend
};

// ---- Decoding

struct DecodeUnit {
  int group, slab, chunk;
  int row, column;  // its first
};

template <class V>
__device__ uint32_t units_of_slab(const Parameters& p) {
  return V::slab / kUnitRows * (p.chunks * (p.chunk_depth / kUnitDepth));
}

// The units of a group are claimed in order of K, so that multiplication can begin with all rows.
template <class V>
__device__ DecodeUnit decode_unit(const Parameters& p, uint32_t index) {
  constexpr uint32_t row_units = V::slab / kUnitRows;
  const uint32_t group_units = p.group_slabs * units_of_slab<V>(p);
  const uint32_t group = index / group_units, in_group = index % group_units;
  const int first_slab = group * p.group_slabs;
  const uint32_t across = min(p.group_slabs, p.slabs - first_slab) * row_units;
  const uint32_t depth = in_group / across, down = in_group % across;
  return {static_cast<int>(group), first_slab + static_cast<int>(down / row_units),
          static_cast<int>(depth) / (p.chunk_depth / kUnitDepth),
          first_slab * V::slab + static_cast<int>(down) * kUnitRows,
          static_cast<int>(depth) * kUnitDepth};
}

// A lane's part of a unit: 8 columns of every second row, and the scales of one row.
struct Codes {
  static constexpr int rows = kUnitRows / 2;
  uint2 of_row[rows];
  uint32_t scales;  // of blocks that are kUnitDepth wide together
};

struct TilePosition {
  int64_t first;  // of the lane's elements
  int rows;       // of the lane's that exist
};

__device__ TilePosition tile_position(const Parameters& p, const DecodeUnit& unit) {
  const int row = unit.row + threadIdx.x % 32 / 16, column = unit.column + threadIdx.x % 16 * 8;
  return {int64_t(row) * p.k + column, column < p.k ? (p.n - row + 1) / 2 : 0};
}

__device__ void load_codes(Codes& codes, const Parameters& p, const DecodeUnit& unit) {
  if (unit.row >= p.n || unit.column >= p.k) return;
  const TilePosition place = tile_position(p, unit);
  const int64_t scale_tile =
      int64_t(unit.row / 128) * ((p.k + kUnitDepth - 1) / kUnitDepth) + unit.column / kUnitDepth;
  const int row = unit.row % 128 + threadIdx.x % kUnitRows;
  codes.scales = __ldg(reinterpret_cast<const uint32_t*>(p.scales + scale_tile * kScaleTile +
                                                         row % 32 * 16 + row / 32 * 4));
#pragma unroll
  for (int i = 0; i < Codes::rows; ++i) {
    if (i < place.rows) {
      codes.of_row[i] =
          __ldcs(reinterpret_cast<const uint2*>(p.codes + place.first + int64_t(2 * i) * p.k));
    }
  }
}

__device__ void store_weights(const Codes& codes, const Parameters& p, const DecodeUnit& unit) {
  if (unit.row >= p.n || unit.column >= p.k) return;
  const TilePosition place = tile_position(p, unit);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Codes::rows; ++i) {
    const uint32_t byte =
        __shfl_sync(~0u, codes.scales, 2 * i + lane / 16) >> lane % 16 / 4 * 8 & 0xFF;
    const uint32_t scale = scale_pair(byte);
    const uint2 of_row = codes.of_row[i];
    uint4 values = {multiply_bf16(decode_pair(of_row.x), scale),
                    multiply_bf16(decode_pair(of_row.x >> 16), scale),
                    multiply_bf16(decode_pair(of_row.y), scale),
                    multiply_bf16(decode_pair(of_row.y >> 16), scale)};
    if (byte >= kFirstSplitByte) {
      const uint32_t rest = rest_pair(byte);
      values = {multiply_bf16(values.x, rest), multiply_bf16(values.y, rest),
                multiply_bf16(values.z, rest), multiply_bf16(values.w, rest)};
    }
    if (i < place.rows) {
      *reinterpret_cast<uint4*>(p.weights + place.first + int64_t(2 * i) * p.k) = values;
    }
  }
}

__device__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ void increment_release(uint32_t* what) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(what) : "memory");
}

// A decoder's work. `group` is where the block says which group it works on.
template <class V>
__device__ void decode_weights(const Parameters& p, int* group) {
  const bool first_lane = threadIdx.x % 32 == 0;
  const uint32_t units = p.slabs * units_of_slab<V>(p);
  const auto claim = [&] { return first_lane ? atomicAdd(p.claimed, 1) : 0; };
  const auto may_begin = [&](const DecodeUnit& unit) {
    const int current = first_lane ? atomicAdd(group, 0) : 0;
    return unit.group <= __shfl_sync(~0u, current, 0) + kGroupsAhead;
  };
  const auto await = [&](const DecodeUnit& unit) {
    while (!may_begin(unit)) __nanosleep(500);
  };
  uint32_t index = __shfl_sync(~0u, claim(), 0);
  if (index >= units) return;
  DecodeUnit unit = decode_unit<V>(p, index);
  Codes codes;
  await(unit);
  load_codes(codes, p, unit);
  while (true) {
    const uint32_t claimed = claim();
    store_weights(codes, p, unit);
    index = __shfl_sync(~0u, claimed, 0);
    const bool is_last = index >= units;
    uint32_t* const ready = p.ready + unit.slab * kMaxChunks + unit.chunk;
    if (!is_last) unit = decode_unit<V>(p, index);
    // The next codes come while this unit's stores become visible.
    const bool begun = !is_last && may_begin(unit);
    if (begun) load_codes(codes, p, unit);
    __syncwarp();  // the lanes' stores are before the first one's release
    if (first_lane) increment_release(ready);
    if (is_last) return;
    if (!begun) {
      await(unit);
      load_codes(codes, p, unit);
    }
  }
}

// ---- The GEMM

template <class V>
__global__ void __launch_bounds__(V::threads, 1)
    once_kernel(const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ CUtensorMap addend_x_map,
                const __grid_constant__ CUtensorMap addend_u_map,
                const __grid_constant__ CUtensorMap d_map, const Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  extern __shared__ uint8_t unaligned[];
  const uint32_t shared = tma_aligned(unaligned);
  // Written and read without a barrier between, hence by atomics only.
  int* const group_of_block =
      reinterpret_cast<int*>(unaligned + (shared - shared_address(unaligned)) + V::group_at);
  const uint32_t x_tiles = shared, w_tiles = shared + V::w_at;
  const int block = block_of_cluster();
  const typename V::Ring pipeline{{shared + V::barriers_at}, block};
  const int warpgroup = threadIdx.x / kWarpgroup;  // the last one copies and decodes

  if (threadIdx.x == 0) {
    pipeline.init();
    mbarrier_init_fence();
    *group_of_block = 0;
  }
  cluster_sync();
  await_predecessors();
  const TileScheduler<GroupedOrder, kCluster> scheduler(
      GroupedOrder{p.m_tiles, p.slabs, p.group_slabs});
  const int steps = (p.k + kDepth - 1) / kDepth;

  if (warpgroup == V::consumers) {
    V::Registers::begin_producer();
    if (threadIdx.x % kWarpgroup >= 32) {
      decode_weights<V>(p, group_of_block);
    } else {
      const int lane = threadIdx.x % 32;
      const uint32_t chunk_units = V::slab / kUnitRows * (p.chunk_depth / kUnitDepth);
      const int chunk_steps = p.chunk_depth / kDepth;
      typename V::Ring::State state;
      if (lane == 0) {
        prefetch_tensor_map(x_map);
        prefetch_tensor_map(w_map);
      }
      for (const TileIndex at : scheduler) {
        const int token = at.m * kTokens;
        if (lane == 0) atomicExch(group_of_block, at.group);
        const uint32_t* const ready = p.ready + at.n * kMaxChunks + lane;
        const int weight = at.n * V::slab + block * V::weights;
        const auto copy_stage = [&](const CUtensorMap& of_x, const CUtensorMap& of_w, int step) {
          const uint32_t full = pipeline.acquire(state, V::x_bytes + V::w_bytes);
          constexpr int part = kTokens / kCluster;
          tma_load_2d_multicast(of_x, full,
                                x_tiles + state.stage * V::x_bytes + block * part * kDepth * 2,
                                step * kDepth, token + block * part, (1 << kCluster) - 1);
          tma_load_2d(of_w, full, w_tiles + state.stage * V::w_bytes, step * kDepth, weight);
          state.advance();
        };
        uint32_t ready_chunks = 0;  // a bit each
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          if (!(ready_chunks >> chunk & 1)) {
            do {
              const bool is_ready = lane < p.chunks && load_acquire(ready) == chunk_units;
              ready_chunks = __ballot_sync(~0u, is_ready);
            } while (!(ready_chunks >> chunk & 1));
            __syncwarp();  // the first lane copies the chunks that all lanes have seen stored
          }
          if (lane == 0) {
            tma_load_fence();
            const int end = min((chunk + 1) * chunk_steps, steps);
            for (int step = chunk * chunk_steps; step < end; ++step) {
              copy_stage(x_map, w_map, step);
            }
          }
          __syncwarp();
        }
        if (lane == 0) {
          for (int step = 0; step < p.addend_steps; ++step) {
            copy_stage(addend_x_map, addend_u_map, step);
          }
        }
        __syncwarp();
      }
      // From now on this block's decoders wait for nothing.
      if (lane == 0) atomicExch(group_of_block, p.slabs);
    }
    __syncwarp();
  } else {
    V::Registers::begin_consumer();
    const int thread = threadIdx.x % kWarpgroup;
    float sums[kTokens / 2];
    int next_buffer = 0;  // for D
    typename V::Ring::State state;
    for (const TileIndex at : scheduler) {
      const int token = at.m * kTokens;
      const int weight = at.n * V::slab + block * V::weights + warpgroup * kGroupWeights;
      const BiasPair bias = load_bias(p.bias, weight, p.n);
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
      int previous = 0;
      for (int step = 0; step < steps + p.addend_steps; ++step) {
        pipeline.wait(state);
        const uint64_t x = wgmma_descriptor(x_tiles + state.stage * V::x_bytes);
        const uint64_t w = wgmma_descriptor(w_tiles + state.stage * V::w_bytes +
                                            warpgroup * kGroupWeights * kDepth * 2);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i) {
          constexpr uint64_t step_of_16 = 16 * 2 / 16;
          WgmmaShared<kTokens>::multiply(sums, w + i * step_of_16, x + i * step_of_16);
        }
        wgmma_commit();
        wgmma_wait_pending<1>();
        if (step > 0) pipeline.release(previous, thread);
        previous = state.stage;
        state.advance();
      }
      wgmma_wait(sums);
      pipeline.release(previous, thread);
      store_tile<kTokens, V::out_buffers>(
          d_map, sums, bias, token, weight,
          shared + V::out_at + warpgroup * V::out_buffers * kOutBytes, next_buffer, 1 + warpgroup);
    }
    if (thread == 0) tma_store_wait_read();
  }
  // No block leaves while the other may still write to its shared memory.
  cluster_sync();
#endif
}

// A kernel, because cudaMemsetAsync takes longer than the work itself.
__global__ void zero_kernel(uint4* what, int count) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  await_predecessors();
  for (int i = threadIdx.x; i < count; i += blockDim.x) what[i] = uint4{};
#endif
}

// ---- Host

// How a GEMM is divided, and its part of the workspace.
struct Plan {
  int chunks, chunk_depth, slabs;
  std::size_t counter_bytes;  // zeroed before the kernel
};

template <class V>
Plan plan_of(int64_t n, int64_t k) {
  const int64_t depth_units = ceil_div(k, kUnitDepth);
  const int64_t chunk_units = ceil_div(depth_units, kMaxChunks);
  Plan plan;
  plan.chunk_depth = static_cast<int>(chunk_units * kUnitDepth);
  plan.chunks = static_cast<int>(ceil_div(depth_units, chunk_units));
  plan.slabs = static_cast<int>(ceil_div(n, V::slab));
  plan.counter_bytes =
      static_cast<std::size_t>(round_up((int64_t{plan.slabs} * kMaxChunks + 1) * 4, 256));
  return plan;
}

template <class V>
void run(const GemmTask& task, Workspace workspace, CudaStream stream) {
  const Plan plan = plan_of<V>(task.n, task.k);
  Parameters p{};
  p.codes = static_cast<const uint8_t*>(task.b.codes);
  p.scales = static_cast<const uint8_t*>(task.b.scales);
  p.bias = static_cast<const __nv_bfloat16*>(task.bias);
  p.ready = static_cast<uint32_t*>(workspace.data);
  p.claimed = p.ready + plan.slabs * kMaxChunks;
  p.weights =
      reinterpret_cast<__nv_bfloat16*>(static_cast<char*>(workspace.data) + plan.counter_bytes);
  p.n = static_cast<int>(task.n);
  p.k = static_cast<int>(task.k);
  p.m_tiles = static_cast<int>(ceil_div(task.m, kTokens));
  p.slabs = plan.slabs;
  p.chunks = plan.chunks;
  p.chunk_depth = plan.chunk_depth;
  const int clusters = multiprocessors(current_device()) / kCluster;
  p.group_slabs = std::min(p.slabs, static_cast<int>(ceil_div(clusters, p.m_tiles)));

  const LowRankAddend* const addend = task.addend;
  p.addend_steps = addend ? static_cast<int>(ceil_div(addend->x.cols, kDepth)) : 0;
  const CUtensorMap x_map =
      bf16_map(task.a.codes, task.m, task.k, task.a.row_stride, kTokens / kCluster);
  const CUtensorMap w_map = bf16_map(p.weights, task.n, task.k, task.k, V::weights);
  launch_clusters(zero_kernel, 1, 1, 1024, 0, stream, static_cast<uint4*>(workspace.data),
                  static_cast<int>(plan.counter_bytes / sizeof(uint4)));
  launch_clusters(once_kernel<V>, clusters, kCluster, V::threads, V::shared_bytes, stream, x_map,
                  w_map, addend ? operand_map(addend->x, kTokens / kCluster) : x_map,
                  addend ? operand_map(addend->u, V::weights) : w_map,
                  bf16_map(task.d, task.m, task.n, task.d_row_stride, kOutTokens), p);
}

using Tile128 = Variant<2, 5, 3>;  // 128 weights
using Tile192 = Variant<3, 4, 2>;  // 192
static_assert(kTokens == 192 && kCluster == 2 && Tile128::weights == 128 && Tile192::weights == 192,
              "mixed_workspace_tile() counts with these");

}  // namespace

std::size_t mixed_workspace_nbytes_sm90(const GemmProblem& problem) {
  return plan_of<Tile128>(problem.n, problem.k).counter_bytes +  // no less than Tile192's
         static_cast<std::size_t>(problem.n) * static_cast<std::size_t>(problem.k) * 2;
}

void mixed_workspace_sm90(const GemmTask& task, Workspace workspace, CudaStream stream) {
  switch (mixed_workspace_tile(task.m, task.n, multiprocessors(current_device()))) {
    case MixedWorkspaceTile::k128:
      return run<Tile128>(task, workspace, stream);
    case MixedWorkspaceTile::k192:
      return run<Tile192>(task, workspace, stream);
  }
}

}  // namespace zimage_mxfp8::detail
