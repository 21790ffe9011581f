// BF16 activations times MXFP8 weights on Hopper, exactly: D[M, N] = X[M, K] W[N, K]^T + bias[N].
//
// The tensor cores take BF16, and every MXFP8 number is a BF16 number (bar its range), so nothing
// is lost: weights stay 8 bits wide until they reach registers, where they are decoded into the
// operand that wgmma takes from there. That makes W the left operand and the product D^T; tiles are
// `tokens` wide and 64 weights high for each row group.
//
// A warp copies tiles of X, W and scales into a ring of stages; warpgroups take them from there.
// Row groups share a tile of X, each with 64 weights of its own. With many tokens the tensor cores
// are the limit: row groups take turns at them, and blocks run from tile to tile. With few tokens
// the time is that of decoding: K groups take stages in turn, blocks of a cluster split K, and
// their sums are added at the end.
#include <algorithm>
#include <string>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "gemm/gemm_cuda.h"
#include "gemm/hopper.cuh"
#include "gemm/wgmma.cuh"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kDepth = 128;        // of K in a stage: as much as a tile of scales covers
constexpr int kHalf = 64;          // of K in a tile of X: 128 bytes, as wide as a swizzle
constexpr int kGroupWeights = 64;  // rows of W that a warpgroup multiplies
constexpr int kScaleTile = 512;    // bytes: the scales of 128 weights and 128 of K
constexpr int kWarpgroup = 128;

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
  // A warpgroup must see every phase of the barriers that it waits for: their parity is all it
  // knows.
  static_assert(stages % k_groups == 0);

  static constexpr int consumers = row_groups * k_groups;
  static constexpr int threads = (consumers + 1) * kWarpgroup;
  static constexpr int weights = row_groups * kGroupWeights;
  static constexpr int sums = tokens / 2;  // a thread's share of a warpgroup's tile

  static constexpr int x_bytes = tokens * kDepth * 2;
  static constexpr int w_bytes = weights * kDepth;
  static constexpr int stage_bytes = x_bytes + w_bytes + kScaleTile;
  // D leaves through shared memory, 32 tokens of a warpgroup at a time, from one of three buffers.
  static constexpr int out_tokens = 32, out_buffers = 3;
  static constexpr int out_bytes = out_tokens * kGroupWeights * 2;
  // Sums of other K groups, and then of other blocks.
  static constexpr int others = k_groups > split ? k_groups - 1 : split - 1;
  static constexpr int sum_bytes = row_groups * kWarpgroup * sums * 4;

  // What TMA swizzles begins at multiples of 1024 bytes.
  static constexpr int w_at = stages * x_bytes;
  static constexpr int out_at = w_at + stages * w_bytes;
  static constexpr int scales_at = out_at + row_groups * out_buffers * out_bytes;
  static constexpr int sums_at = scales_at + stages * kScaleTile;
  static constexpr int barriers_at = sums_at + others * sum_bytes;
  static constexpr int shared_bytes = barriers_at + 2 * stages * 8 + 1024;  // to align the start
  static_assert(shared_bytes <= 232448);
  static_assert(x_bytes % 1024 == 0 && w_bytes % 1024 == 0 && out_bytes % 1024 == 0);
};

struct Parameters {
  const uint8_t* scales;
  const __nv_bfloat16* bias;
  int n;
  int k_steps;           // of kDepth; also the scale tiles of a row of such tiles
  int scale_rows;        // rows of scale tiles
  int m_tiles, n_tiles;  // tiles of tokens, and of weights (those that share X count as one)
};

__device__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Two E4M3 codes in the low bytes as BF16, times 2^-120: with E4M3's exponent field in BF16's, and
// subnormals as subnormals. Few instructions, because decoding competes with the tensor cores for
// the time of a stage. Codes for NaN come out as 480 (the block is NaN if its scale is).
__device__ uint32_t decode_pair(uint32_t codes) {
  uint32_t extended;  // a byte, and its sign eight times; twice
  asm("prmt.b32 %0, %1, 0, 0x9180;" : "=r"(extended) : "r"(codes));
  return (extended << 4) & 0x87F087F0;
}

// The factor 2^120 * 2^(byte - 127) for decode_pair(), twice. It does not fit BF16 from this byte
// on: then it is split.
constexpr uint32_t kFirstSplitByte = 135;

__device__ uint32_t scale_pair(uint32_t byte) {
  return (min(byte, kFirstSplitByte - 1) + 120) * 0x00800080;
}

// The other part of a split factor; NaN for byte 255.
__device__ uint32_t rest_pair(uint32_t byte) {
  const uint32_t field = byte == 255 ? 0x7FC0 : (byte < kFirstSplitByte ? 127 : byte - 7) << 7;
  return field | field << 16;
}

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
  // A byte of kFirstSplitByte or more: its high bit is set, and what is below exceeds 6.
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

// Where the tile that a block works on lies.
struct Tile {
  int token, weight;
};

template <class V>
__device__ Tile tile_of(const Parameters& p, int index, int block) {
  const int weights = index / p.m_tiles * V::multicast + (V::multicast > 1 ? block : 0);
  return {index % p.m_tiles * V::tokens, weights * V::weights};
}

// Writes a warpgroup's 64 weights x V::tokens of D, which is transposed in `sums`. `out` are the
// warpgroup's buffers, `next` the one to use.
template <class V>
__device__ void store_tile(const CUtensorMap& d_map, const Parameters& p,
                           const float (&sums)[V::sums], Tile tile, uint32_t out, int& next,
                           int barrier) {
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
  float bias[2] = {};
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = tile.weight + warp * 16 + lane / 4 + 8 * i;
      if (n < p.n) bias[i] = __bfloat162float(p.bias[n]);
    }
  }
#pragma unroll
  for (int first = 0; first < V::tokens; first += V::out_tokens) {
    const uint32_t buffer = out + next * V::out_bytes;
#pragma unroll
    for (int pair = 0; pair < V::out_tokens / 16; ++pair) {
      // Four 8x8 matrices, [8 tokens][8 weights] each when transposed: two groups of tokens times
      // the thread's rows and those 8 below.
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = ((first / 8) + pair * 2 + i / 2) * 4 + i % 2 * 2;
        const __nv_bfloat162 two =
            __floats2bfloat162_rn(sums[at] + bias[i % 2], sums[at + 1] + bias[i % 2]);
        packed[i] = reinterpret_cast<const uint32_t&>(two);
      }
      // In rows of 64 weights, swizzled as TMA expects it.
      const int matrix = lane / 8, row = pair * 16 + matrix / 2 * 8 + lane % 8;
      const int piece = warp * 2 + matrix % 2;
      store_matrices_transposed(buffer + row * kGroupWeights * 2 + (piece ^ row % 8) * 16, packed);
    }
    fence_for_copies();
    // The barrier also tells that the next buffer is free: of the copies that were started all but
    // the last have read theirs.
    if (thread == 0) await_copies_read<1>();
    named_barrier(barrier, kWarpgroup);
    if (thread == 0) {
      copy_box_out(d_map, buffer, tile.weight, tile.token + first);
      commit_copies();
    }
    next = next == V::out_buffers - 1 ? 0 : next + 1;
  }
}

template <class V>
__global__ void __launch_bounds__(V::threads, 1)
    exact_kernel(const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap d_map, const Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  const uint32_t shared = (shared_address(unaligned) + 1023) / 1024 * 1024;
  const uint32_t x_tiles = shared, w_tiles = shared + V::w_at, scale_tiles = shared + V::scales_at;
  const auto full = [&](int stage) { return shared + V::barriers_at + stage * 8; };
  const auto empty = [&](int stage) { return shared + V::barriers_at + (V::stages + stage) * 8; };
  const int block = V::cluster > 1 ? block_of_cluster() : 0;
  const int group = threadIdx.x / kWarpgroup;  // the last one copies

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < V::stages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), V::row_groups * V::multicast);
    }
    barrier_init_fence();
  }
  if constexpr (V::cluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int tiles = p.m_tiles * p.n_tiles;
  const int first_tile = blockIdx.x / V::cluster, tile_step = gridDim.x / V::cluster;
  // This block's part of K.
  const int steps_each = (p.k_steps + V::split - 1) / V::split;
  const int first_step = V::split > 1 ? min(block * steps_each, p.k_steps) : 0;
  const int steps = min(steps_each, p.k_steps - first_step);

  if (group == V::consumers) {
    if constexpr (V::consumers == 2) fewer_registers<40>();
    if (threadIdx.x % kWarpgroup == 0) {
      prefetch_map(x_map);
      prefetch_map(w_map);
      int stage = 0;
      uint32_t phase = 0;
      for (int index = first_tile; index < tiles; index += tile_step) {
        const Tile tile = tile_of<V>(p, index, block);
        // Beyond the last weight only zeros are copied, and any scales will do.
        const int scale_row = min(tile.weight / 128, p.scale_rows - 1);
        for (int step = first_step; step < first_step + steps; ++step) {
          barrier_wait(empty(stage), phase ^ 1);
          barrier_expect(full(stage), V::stage_bytes);
          for (int half = 0; half < 2; ++half) {
            const int k = step * kDepth + half * kHalf;
            const uint32_t target = x_tiles + stage * V::x_bytes + half * V::tokens * kHalf * 2;
            if constexpr (V::multicast > 1) {
              constexpr int part = V::tokens / V::multicast;
              copy_box_to_cluster(x_map, full(stage), target + block * part * kHalf * 2, k,
                                  tile.token + block * part, (1 << V::multicast) - 1);
            } else {
              copy_box(x_map, full(stage), target, k, tile.token);
            }
          }
          copy_box(w_map, full(stage), w_tiles + stage * V::w_bytes, step * kDepth, tile.weight);
          copy_bytes(p.scales + (int64_t(scale_row) * p.k_steps + step) * kScaleTile, full(stage),
                     scale_tiles + stage * kScaleTile, kScaleTile);
          if (++stage == V::stages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
    if constexpr (V::split > 1) {  // with the others, who add sums between the two
      cluster_sync();
      cluster_sync();
    }
  } else {
    if constexpr (V::consumers == 2) more_registers<232>();
    const int row_group = group % V::row_groups, k_group = group / V::row_groups;
    const int thread = threadIdx.x % kWarpgroup;
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float sums[V::sums];
    Fragments fragments;
    uint32_t done = 0;    // steps of the tiles before this one
    int next_buffer = 0;  // for D
    // Row groups take turns at the tensor cores, so that one decodes while the other multiplies.
    const auto await_turn = [&] {
      if constexpr (V::row_groups == 2) named_barrier(4 + group, 2 * kWarpgroup);
    };
    const auto pass_turn = [&] {
      if constexpr (V::row_groups == 2) named_barrier_arrive(4 + (group ^ 1), 2 * kWarpgroup);
    };
    if (group == 1) pass_turn();
    // Sums of another K group or block: where a thread finds its own.
    const auto other_sums = [&](int other) {
      return shared + V::sums_at + other * V::sum_bytes +
             (row_group * (V::sums / 4) * kWarpgroup + thread) * 16;
    };
    const auto add_others = [&](int begin, int end) {
      for (int other = begin; other < end; ++other) {
#pragma unroll
        for (int i = 0; i < V::sums / 4; ++i) {
          const float4 four = load_shared(other_sums(other) + i * kWarpgroup * 16);
          sums[4 * i] += four.x;
          sums[4 * i + 1] += four.y;
          sums[4 * i + 2] += four.z;
          sums[4 * i + 3] += four.w;
        }
      }
    };
    const auto give_sums = [&](int other, int to_block) {
#pragma unroll
      for (int i = 0; i < V::sums / 4; ++i) {
        store_shared(other_sums(other) + i * kWarpgroup * 16, to_block,
                     make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
      }
    };

    for (int index = first_tile; index < tiles; index += tile_step) {
      Tile tile = tile_of<V>(p, index, block);
      tile.weight += row_group * kGroupWeights;
#pragma unroll
      for (int i = 0; i < V::sums; ++i) sums[i] = 0.0f;
      for (int step = k_group; step < steps; step += V::k_groups) {
        // The ring has gone around position / stages times when a step's stage is full.
        const uint32_t position = done + step, stage = position % V::stages;
        barrier_wait(full(stage), position / V::stages % 2);
        load_fragments(fragments, w_tiles + stage * V::w_bytes + row_group * kGroupWeights * kDepth,
                       row, scale_tiles + stage * kScaleTile, tile.weight % 128 + row);
        const uint64_t x = wgmma_descriptor(x_tiles + stage * V::x_bytes);
        await_turn();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          // The other group's first products may come before the last of this one.
          if (i == kSteps - 1) pass_turn();
          constexpr uint64_t half = V::tokens * kHalf * 2 / 16, step_of_16 = 16 * 2 / 16;
          Wgmma<V::tokens>::multiply(sums, fragments[i], x + i / 4 * half + i % 4 * step_of_16);
        }
        wgmma_commit();
        wgmma_wait();
        if (thread < V::multicast) {
          barrier_arrive(empty(stage), V::multicast > 1 ? thread : block);
        }
      }
      done += steps;

      if constexpr (V::k_groups > 1) {
        if (k_group > 0) give_sums(k_group - 1, block);
        named_barrier(1, V::consumers * kWarpgroup);
        if (k_group == 0) add_others(0, V::k_groups - 1);
      }
      if constexpr (V::split > 1) {
        cluster_sync();  // the first block has added its own K groups' sums
        if (k_group == 0 && block > 0) give_sums(block - 1, 0);
        cluster_sync();
        if (block > 0) break;
        if (k_group == 0) add_others(0, V::split - 1);
      }
      if (k_group == 0) {
        store_tile<V>(d_map, p, sums, tile,
                      shared + V::out_at + row_group * V::out_buffers * V::out_bytes, next_buffer,
                      2 + row_group);
      }
    }
    if (thread == 0) await_copies();
  }
  // No block leaves while another may still write to its shared memory.
  if constexpr (V::multicast > 1) cluster_sync();
#endif
}

// ---- Host

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    ZM_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                   cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) throw Unsupported("the CUDA driver is too old");
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// A matrix that TMA copies in boxes of `box_rows` rows and 128 bytes; zeros beyond its edges.
CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int64_t item, int64_t rows,
                       int64_t cols, int64_t row_stride, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride * item)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / item),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode_tiled()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw CudaError("CUDA: cuTensorMapEncodeTiled failed with " +
                    std::to_string(static_cast<int>(result)));
  }
  return map;
}

template <class V>
void run(const GemmTask& task, CudaStream stream) {
  constexpr auto kBF16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMap x_map = tensor_map(task.a.codes, kBF16, 2, task.m, task.k, task.a.row_stride,
                                       V::tokens / V::multicast);
  const CUtensorMap w_map = tensor_map(task.b.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, task.n,
                                       task.k, task.k, V::weights);
  const CUtensorMap d_map =
      tensor_map(task.d, kBF16, 2, task.m, task.n, task.d_row_stride, V::out_tokens);
  Parameters p{};
  p.scales = static_cast<const uint8_t*>(task.b.scales);
  p.bias = static_cast<const __nv_bfloat16*>(task.bias);
  p.n = static_cast<int>(task.n);
  p.k_steps = static_cast<int>(ceil_div(task.k, kDepth));
  p.scale_rows = static_cast<int>(ceil_div(task.n, 128));
  p.m_tiles = static_cast<int>(ceil_div(task.m, V::tokens));
  p.n_tiles = static_cast<int>(ceil_div(task.n, V::weights * V::multicast));

  const auto kernel = exact_kernel<V>;
  ZM_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, V::shared_bytes));
  int64_t clusters = int64_t{p.m_tiles} * p.n_tiles;
  if (V::split == 1) {
    clusters = std::min<int64_t>(clusters, multiprocessors(current_device()) / V::cluster);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * V::cluster));
  config.blockDim = dim3(V::threads);
  config.dynamicSmemBytes = V::shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = V::cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  ZM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, x_map, w_map, d_map, p));
}

using Few32 = Variant<32, 1, 4, 1, 2, 8>;
using Few64 = Variant<64, 1, 4, 1, 2, 4>;
using Few128 = Variant<128, 1, 2, 1, 2, 4>;
using Few128Wide = Variant<128, 2, 1, 1, 1, 4>;
using Many = Variant<192, 2, 1, 2, 1, 3>;

}  // namespace

Support supports_sm90() { return {true, ""}; }

// Chosen by measurement on an H100 (docs/performance.md).
void gemm_sm90(const GemmTask& task, CudaStream stream) {
  if (task.m <= Few32::tokens) return run<Few32>(task, stream);
  if (task.m > Few128::tokens) return run<Many>(task, stream);
  // Half of the multiprocessors with whole tiles are better than all of them with parts.
  if (ceil_div(task.n, Few128Wide::weights) * 2 >= multiprocessors(current_device())) {
    return run<Few128Wide>(task, stream);
  }
  if (task.m <= Few64::tokens) return run<Few64>(task, stream);
  return run<Few128>(task, stream);
}

}  // namespace zimage_mxfp8::detail
