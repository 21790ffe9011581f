// FP8 GEMMs on Hopper, fused with the DiT's next operation.
//
// D = A B^T in tiles of 128 tokens and 256 rows of B, from tile to tile. In a block
// - a thread copies tiles of A and B into a ring of stages;
// - two warpgroups multiply, 64 tokens each, and leave their sums, rounded, in shared memory;
// - three warps read them from there, scale them and apply the epilogue: they have the time of a
//   whole tile, while the tensor cores work on the next one.
//
// Two blocks with rows of B of their own share the tiles of A.
//
// With a low-rank addend, D = (A B^T + X U^T) scaled: X and U are BF16, and their stages of 64
// columns, which have as many bytes as those of A and B, follow in the same ring. X is divided by
// A's scales and U by B's beforehand, because sums are scaled at the end.
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
#include "fused/arithmetic.cuh"
#include "gemm/dispatch/heuristics.h"
#include "gemm/sm90/fp8_fused.h"
#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kEpilogueWarps = 3;  // the warp before them copies

constexpr int kCluster = 2;       // blocks that share tiles of A
constexpr int kGroupTokens = 64;  // that a warpgroup multiplies
constexpr int kTokens = kConsumers * kGroupTokens;
constexpr int kRows = 256;   // of B in a tile, copied in two halves
constexpr int kDepth = 128;  // of K in a stage: as wide as TMA's swizzle
static_assert(kTokens == kFP8SM90TileM && kCluster * kRows == kFP8SM90TileN &&
              kCluster == kFP8SM90Cluster);
constexpr int kStages = 3;
// Pairs of tiles of B that all tokens are multiplied with before the next ones: they stay in the
// cache.
constexpr int kGroupPairs = 4;

constexpr int kABytes = kTokens * kDepth, kBBytes = kRows * kDepth;
// A warpgroup's tokens are left in boxes of 64 columns; each warp has 16 tokens of them.
constexpr int kBoxColumns = 64, kBoxes = kRows / kBoxColumns;
constexpr int kWarpTokens = 16;
constexpr int kBoxBytes = kGroupTokens * kBoxColumns * 2;

constexpr int kBAt = kStages * kABytes;
constexpr int kOutAt = kBAt + kStages * kBBytes;
constexpr int kBarriersAt = kOutAt + kConsumers * kBoxes * kBoxBytes;
constexpr int kWarps = kConsumers * 4;  // that multiply
using Ring = Pipeline<kStages, kConsumers, kCluster>;
using SumBarriers = BarrierPairs<kWarps>;
constexpr int kSumBarriersAt = kBarriersAt + Ring::Barriers::bytes;
constexpr int kSharedBytes = kSumBarriersAt + SumBarriers::bytes + kTmaAlignment;
static_assert(kSharedBytes <= 232448);
static_assert(kABytes / kCluster % kTmaAlignment == 0 && kBBytes / 2 % kTmaAlignment == 0 &&
              kBoxBytes % kTmaAlignment == 0);

// A warp's 16 tokens in boxes, as TMA swizzles them.
struct SmemTile {
  uint32_t address;

  // Where eight columns are: piece 0 to 7 of a box.
  __device__ uint32_t piece(int token, int box, int of_box) const {
    return address + box * kBoxBytes + token * kBoxColumns * 2 + (of_box ^ token % 8) * 16;
  }
};

// Eight columns of BF16, or of scales, as float32.
struct Vec8 {
  float of[8];

  __device__ void load(uint32_t address) {
    const float4 words = load_shared(address);
    unpack(__float_as_uint(words.x), 0);
    unpack(__float_as_uint(words.y), 2);
    unpack(__float_as_uint(words.z), 4);
    unpack(__float_as_uint(words.w), 6);
  }

  __device__ void load(const float* scales) {
    const auto* const fours = reinterpret_cast<const float4*>(scales);
    const float4 low = __ldg(fours), high = __ldg(fours + 1);
    of[0] = low.x, of[1] = low.y, of[2] = low.z, of[3] = low.w;
    of[4] = high.x, of[5] = high.y, of[6] = high.z, of[7] = high.w;
  }

  __device__ void scale(float of_token, const Vec8& of_columns) {
#pragma unroll
    for (int i = 0; i < 8; ++i) of[i] = __fmul_rn(__fmul_rn(of[i], of_token), of_columns.of[i]);
  }

  __device__ float sum_of_squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fmaf_rn(of[i], of[i], sum);
    return sum;
  }

  __device__ void store(uint32_t address) const {
    store_shared(address, make_uint4(round2(of[0], of[1]), round2(of[2], of[3]),
                                     round2(of[4], of[5]), round2(of[6], of[7])));
  }

 private:
  __device__ void unpack(uint32_t pair, int at) {
    of[at] = __uint_as_float(pair << 16);
    of[at + 1] = __uint_as_float(pair & 0xFFFF0000);
  }
};

struct Operands {
  const float* a_scales;
  const float* b_scales;
  int m, n, k;

  // Those of a warp's tokens, one in each lane of 16.
  __device__ float a_scales16(int first_token) const {
    return __ldg(a_scales + min(first_token + int(threadIdx.x) % kWarpTokens, m - 1));
  }
  // N is a multiple of 8.
  __device__ Vec8 b_scales8(int row) const {
    Vec8 scales;
    scales.load(b_scales + min(row, n - 8));
    return scales;
  }
};

// ---- Epilogues. Each has the columns of D that a tile gives, the row of B at which each half of a
// tile of B begins, and the operation, in place on a warp's tokens. It takes a few tokens at a
// time, so that their loads overlap.

constexpr int kTogether = 4;

// The scales alone, for GEMMs with an addend and without another operation.
struct Scale {
  static constexpr bool needs_addend = true;
  static constexpr int kColumns = kRows;

  __device__ int row_of_b(int tile, int half) const { return tile * kRows + half * kRows / 2; }

  __device__ void operator()(SmemTile boxes, const Operands& operands, int first_token,
                             int tile) const {
    const int lane = threadIdx.x % 32, box = lane / 8, piece = lane % 8;
    const float a_scales = operands.a_scales16(first_token);
    const Vec8 b_scales = operands.b_scales8(tile * kRows + lane * 8);
#pragma unroll 1
    for (int first = 0; first < kWarpTokens; first += kTogether) {
      Vec8 values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i].load(boxes.piece(first + i, box, piece));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        values[i].scale(__shfl_sync(~0u, a_scales, first + i), b_scales);
        values[i].store(boxes.piece(first + i, box, piece));
      }
    }
  }
};

// Half of a tile of B belongs to the gate, half to the factor that the gate multiplies.
struct SiluMultiply {
  static constexpr bool needs_addend = false;
  static constexpr int kColumns = kRows / 2;
  int columns;  // of D

  __device__ int row_of_b(int tile, int half) const { return tile * kColumns + half * columns; }

  __device__ void operator()(SmemTile boxes, const Operands& operands, int first_token,
                             int tile) const {
    const int lane = threadIdx.x % 32, box = lane % 16 / 8, piece = lane % 8;
    const int column = min(tile * kColumns + lane % 16 * 8, columns - 8);
    const Vec8 gate_scales = operands.b_scales8(column);
    const Vec8 up_scales = operands.b_scales8(columns + column);
    const float a_scales = operands.a_scales16(first_token);
#pragma unroll 1
    for (int first = lane / 16; first < kWarpTokens; first += 2 * kTogether) {
      Vec8 gate[kTogether], up[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        gate[i].load(boxes.piece(first + 2 * i, box, piece));
        up[i].load(boxes.piece(first + 2 * i, box + kBoxes / 2, piece));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float a_scale = __shfl_sync(~0u, a_scales, first + 2 * i);
        gate[i].scale(a_scale, gate_scales);
        up[i].scale(a_scale, up_scales);
#pragma unroll
        for (int e = 0; e < 8; ++e) gate[i].of[e] = __fmul_rn(silu(gate[i].of[e]), up[i].of[e]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) gate[i].store(boxes.piece(first + 2 * i, box, piece));
    }
  }
};

// A tile has two heads, with half of the lanes each.
struct RotateHeads {
  static constexpr bool needs_addend = false;
  static constexpr int kColumns = kRows;
  static constexpr int kLanes = 16;
  const uint4* q_weight;  // eight BF16 each
  const uint4* k_weight;
  const float4* rotations;  // two pairs each
  int64_t rotation_stride;  // of a row
  int heads;
  float eps;

  __device__ int row_of_b(int tile, int half) const { return tile * kRows + half * kRows / 2; }

  __device__ void operator()(SmemTile boxes, const Operands& operands, int first_token,
                             int tile) const {
    const int lane = threadIdx.x % 32, box = lane / 8, piece = lane % 8;
    const float a_scales = operands.a_scales16(first_token);
    const Vec8 b_scales = operands.b_scales8(tile * kRows + lane * 8);
    const auto load_scaled = [&](int first, Vec8(&values)[kTogether]) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i].load(boxes.piece(first + i, box, piece));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        values[i].scale(__shfl_sync(~0u, a_scales, first + i), b_scales);
      }
    };
    const auto store = [&](int first, const Vec8(&values)[kTogether]) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i].store(boxes.piece(first + i, box, piece));
    };
    Vec8 values[kTogether];
    if (tile >= heads) {  // both heads are of v; of the tiles before, all are of q and k
#pragma unroll 1
      for (int first = 0; first < kWarpTokens; first += kTogether) {
        load_scaled(first, values);
        store(first, values);
      }
      return;
    }
    const int head = tile * 2 + lane / kLanes;
    Weight weight;
    weight.vector = __ldg((head < heads ? q_weight : k_weight) + lane % kLanes);
    RotationPairs next = load_turns(first_token, operands.m);
#pragma unroll 1
    for (int first = 0; first < kWarpTokens; first += kTogether) {
      const RotationPairs turns = next;
      next = load_turns(first_token + min(first + kTogether, kWarpTokens - 1), operands.m);
      load_scaled(first, values);
      float mean[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) mean[i] = values[i].sum_of_squares() * (1.0f / kHeadSize);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) mean[i] += __shfl_xor_sync(~0u, mean[i], step);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float factor = rsqrtf(__fadd_rn(mean[i], eps));
        values[i] = normed_and_rotated(values[i], weight, factor, turns.of[i]);
      }
      store(first, values);
    }
  }

 private:
  union Weight {
    uint4 vector;
    uint32_t pair[4];
  };

  // Cosines and sines of a lane's columns, for tokens that are taken together.
  struct RotationPairs {
    float4 of[kTogether][2];
  };

  __device__ RotationPairs load_turns(int token, int tokens) const {
    RotationPairs turns;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float4* const of_row =
          rotations + min(token + i, tokens - 1) * rotation_stride + threadIdx.x % kLanes * 2;
      turns.of[i][0] = __ldg(of_row);
      turns.of[i][1] = __ldg(of_row + 1);
    }
    return turns;
  }

  static __device__ Vec8 normed_and_rotated(const Vec8& values, const Weight& weight, float factor,
                                            const float4 (&turns)[2]) {
    Vec8 result;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const uint32_t pair = weight.pair[e / 2];
      const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000);
      const float2 normed = {__fmul_rn(__fmul_rn(values.of[e], low), factor),
                             __fmul_rn(__fmul_rn(values.of[e + 1], high), factor)};
      const float4& turn = turns[e / 4];
      const float2 rotated =
          rotate(normed, e % 4 == 0 ? float2{turn.x, turn.y} : float2{turn.z, turn.w});
      result.of[e] = rotated.x;
      result.of[e + 1] = rotated.y;
    }
    return result;
  }
};

// ---- The GEMM

template <class Epilogue>
struct Parameters {
  Epilogue epilogue;
  Operands operands;
  int m_tiles, n_tiles;
  int addend_steps;  // stages of the addend
};

// How wide a low-rank addend is: a multiple of a stage's columns, or half of them more. The
// compiler serializes the multiplications of a kernel that decides that while it runs.
enum class Addend { kNone, kWhole, kEndsHalf };

constexpr std::true_type kWholeStage;
constexpr std::false_type kHalfStage;

// Multiplies half of a stage and adds to the sums, which a tile's first stage begins.
__device__ void multiply(float (&sums)[kRows / 2], uint64_t a, uint64_t b, int half, bool first) {
  constexpr uint64_t step_of_32 = 32 / 16;
#pragma unroll
  for (int i = 2 * half; i < 2 * half + 2; ++i) {
    WgmmaFP8<kRows>::multiply(sums, a + i * step_of_32, b + i * step_of_32, !(first && i == 0));
  }
  wgmma_commit();
}

// The same of the addend, half of 64 columns of BF16.
__device__ void multiply_addend(float (&sums)[kRows / 2], uint64_t a, uint64_t b, int half) {
  constexpr uint64_t step_of_16 = 32 / 16;
#pragma unroll
  for (int i = 2 * half; i < 2 * half + 2; ++i) {
    WgmmaShared<kRows>::multiply(sums, a + i * step_of_16, b + i * step_of_16);
  }
  wgmma_commit();
}

// Leaves a warp's sums of 16 tokens (see wgmma.cuh), rounded.
__device__ void store_sums(const float (&sums)[kRows / 2], SmemTile boxes) {
  // Four 8x8 matrices at a time: eight tokens and those 8 below, two groups of eight columns.
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < kRows / 8; i += 2) {
    const float* const eight = sums + 4 * i;
    const uint32_t words[4] = {round2(eight[0], eight[1]), round2(eight[2], eight[3]),
                               round2(eight[4], eight[5]), round2(eight[6], eight[7])};
    store_matrices(boxes.piece(row, i / 8, i % 8 + matrix / 2), words);
  }
}

template <class Epilogue, Addend addend>
__global__ void __launch_bounds__(kThreads, 1)
    fused_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map,
                      const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ CUtensorMap u_map,
                      const __grid_constant__ CUtensorMap d_map, const Parameters<Epilogue> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  extern __shared__ uint8_t unaligned[];
  const uint32_t shared = tma_aligned(unaligned);
  const uint32_t a_tiles = shared, b_tiles = shared + kBAt;
  // For each warp: full when its sums are in its boxes, empty when they have been taken.
  const SumBarriers sum_barriers{shared + kSumBarriersAt};
  const auto boxes_of = [&](int warp) {
    return SmemTile{shared + kOutAt + warp / 4 * kBoxes * kBoxBytes +
                    warp % 4 * kWarpTokens * kBoxColumns * 2};
  };
  const int block = block_of_cluster();
  const Ring pipeline{{shared + kBarriersAt}, block};
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    pipeline.init();
    sum_barriers.init(1, 1);
    mbarrier_init_fence();
  }
  cluster_sync();
  await_predecessors();
  const TileScheduler<GroupedOrder, kCluster> scheduler(
      GroupedOrder{p.m_tiles, (p.n_tiles + kCluster - 1) / kCluster, kGroupPairs});
  const int steps = (p.operands.k + kDepth - 1) / kDepth;

  if (warpgroup < kConsumers) {
    const int thread = threadIdx.x % kWarpgroup, warp = threadIdx.x / 32;
    Ring::State state;
    uint32_t empty_phase = 1;  // all boxes are empty at first
    for (const TileIndex at : scheduler) {
      float sums[kRows / 2];
      int previous = 0;
      // Multiplies a stage, or the first half of it. The one before is released as soon as it has
      // been read, while the tensor cores have work.
      const auto multiply_stage = [&](bool first, auto whole, auto multiply_half) {
        pipeline.wait(state);
        const uint64_t a =
            wgmma_descriptor(a_tiles + state.stage * kABytes + warpgroup * kGroupTokens * kDepth);
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
          multiply(sums, a, b, half, step == 0 && half == 0);
        });
      }
      if constexpr (addend != Addend::kNone) {
        const auto multiply_columns = [&](uint64_t a, uint64_t b, int half) {
          multiply_addend(sums, a, b, half);
        };
        constexpr bool ends_half = addend == Addend::kEndsHalf;
        for (int step = ends_half ? 1 : 0; step < p.addend_steps; ++step) {
          multiply_stage(false, kWholeStage, multiply_columns);
        }
        if constexpr (ends_half) multiply_stage(false, kHalfStage, multiply_columns);
      }
      wgmma_wait(sums);
      pipeline.release(previous, thread);
      const int b_tile = at.n * kCluster + block;
      if (b_tile >= p.n_tiles) continue;
      mbarrier_wait(sum_barriers.empty(warp), empty_phase);
      empty_phase ^= 1;
      store_sums(sums, boxes_of(warp));
      __syncwarp();
      if (lane == 0) mbarrier_arrive(sum_barriers.full(warp));
    }
  } else {
    const int epilogue_warp = threadIdx.x % kWarpgroup / 32 - 1;
    if (epilogue_warp >= 0) {
      uint32_t full_phase = 0;
      for (const TileIndex at : scheduler) {
        const int first_token = at.m * kTokens, b_tile = at.n * kCluster + block;
        if (b_tile >= p.n_tiles) continue;
#pragma unroll 1
        for (int warp = epilogue_warp; warp < kWarps; warp += kEpilogueWarps) {
          const int token = first_token + warp * kWarpTokens;
          const SmemTile boxes = boxes_of(warp);
          mbarrier_wait(sum_barriers.full(warp), full_phase);
          p.epilogue(boxes, p.operands, token, b_tile);
          tma_store_fence();
          __syncwarp();
          if (lane == 0) {
            for (int box = 0; box < Epilogue::kColumns / kBoxColumns; ++box) {
              tma_store_2d(d_map, boxes.address + box * kBoxBytes,
                           b_tile * Epilogue::kColumns + box * kBoxColumns, token);
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
      Ring::State state;
      for (const TileIndex at : scheduler) {
        const int token = at.m * kTokens, b_tile = at.n * kCluster + block;
        const int b_rows[2] = {p.epilogue.row_of_b(b_tile, 0), p.epilogue.row_of_b(b_tile, 1)};
        const auto load = [&](const CUtensorMap& of_a, const CUtensorMap& of_b, int column) {
          const uint32_t full = pipeline.acquire(state, kABytes + kBBytes);
          const uint32_t a = a_tiles + state.stage * kABytes, b = b_tiles + state.stage * kBBytes;
          constexpr int part = kTokens / kCluster;
          tma_load_2d_multicast(of_a, full, a + block * part * kDepth, column, token + block * part,
                                (1 << kCluster) - 1);
          tma_load_2d(of_b, full, b, column, b_rows[0]);
          tma_load_2d(of_b, full, b + kBBytes / 2, column, b_rows[1]);
          state.advance();
        };
        for (int step = 0; step < steps; ++step) load(a_map, b_map, step * kDepth);
        if constexpr (addend != Addend::kNone) {
          for (int step = 0; step < p.addend_steps; ++step) load(x_map, u_map, step * kDepth / 2);
        }
      }
    }
    __syncwarp();
  }
  // No block leaves while the other may still write to its shared memory.
  cluster_sync();
#endif
}

template <class Epilogue>
void run(const ConstRowScaledView& a, const ConstRowScaledView& b, const Epilogue& epilogue,
         const LowRankAddend* addend, const MatrixView& target, CudaStream stream) {
  Parameters<Epilogue> p{};
  p.epilogue = epilogue;
  p.operands = {a.scales, b.scales, static_cast<int>(a.rows), static_cast<int>(b.rows),
                static_cast<int>(a.cols)};
  p.m_tiles = static_cast<int>(ceil_div(a.rows, kTokens));
  p.n_tiles = static_cast<int>(ceil_div(target.cols, Epilogue::kColumns));
  const int64_t tiles = int64_t{p.m_tiles} * ((p.n_tiles + 1) / 2);
  const int64_t clusters =
      std::min<int64_t>(checked_count(tiles), multiprocessors(current_device()) / kCluster);
  const int64_t row_stride = target.rows > 1 ? target.row_stride : target.cols;
  const CUtensorMap a_map = operand_map(a, kTokens / kCluster), b_map = operand_map(b, kRows / 2);
  const CUtensorMap d_map =
      bf16_map(target.data, target.rows, target.cols, row_stride, kWarpTokens);
  const auto start = [&](auto kernel, const CUtensorMap& x_map, const CUtensorMap& u_map) {
    launch_clusters(kernel, static_cast<uint32_t>(clusters), kCluster, kThreads, kSharedBytes,
                    stream, a_map, b_map, x_map, u_map, d_map, p);
  };
  if constexpr (!Epilogue::needs_addend) {
    if (!addend) return start(fused_gemm_kernel<Epilogue, Addend::kNone>, a_map, b_map);
  }
  constexpr int kColumns = kDepth / 2;  // of BF16 in a stage
  p.addend_steps = static_cast<int>(ceil_div(addend->x.cols, kColumns));
  const CUtensorMap x_map = operand_map(addend->x, kTokens / kCluster),
                    u_map = operand_map(addend->u, kRows / 2);
  if (p.addend_steps * kColumns - addend->x.cols < kColumns / 2) {
    start(fused_gemm_kernel<Epilogue, Addend::kWhole>, x_map, u_map);
  } else {
    start(fused_gemm_kernel<Epilogue, Addend::kEndsHalf>, x_map, u_map);
  }
}

}  // namespace

void gemm_low_rank_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                        const LowRankAddend& addend, const MatrixView& target, CudaStream stream) {
  run(a, b, Scale{}, &addend, target, stream);
}

void gemm_silu_multiply_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                             const LowRankAddend* addend, const MatrixView& target,
                             CudaStream stream) {
  run(a, b, SiluMultiply{static_cast<int>(target.cols)}, addend, target, stream);
}

void gemm_rotate_heads_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                            const void* q_weight, const void* k_weight,
                            const ConstMatrixView& rotations, int64_t heads, float eps,
                            const LowRankAddend* addend, const MatrixView& target,
                            CudaStream stream) {
  const RotateHeads epilogue{static_cast<const uint4*>(q_weight),
                             static_cast<const uint4*>(k_weight),
                             static_cast<const float4*>(rotations.data),
                             rotations.row_stride / 4,
                             static_cast<int>(heads),
                             eps};
  run(a, b, epilogue, addend, target, stream);
}

}  // namespace zimage_mxfp8::detail
