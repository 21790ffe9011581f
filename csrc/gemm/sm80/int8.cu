// INT8 GEMMs with one float32 scale per row by the instructions of compute capability 8.0, which
// newer devices have too (PTX ISA: mma.sync, ldmatrix, cp.async).
//
// A block computes 128 tokens and 128 rows of B; each of its four warps 64 of both. Stages of 64
// columns arrive in a ring in shared memory, where rows have four pieces of 16 bytes that are
// permuted so that eight rows of a matrix are in different banks.
#include <stdint.h>

#include "cuda/launch.cuh"
#include "fused/arithmetic.cuh"
#include "gemm/dispatch/table.h"
#include "gemm/sizes.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kTile = 128;               // tokens, and rows of B
constexpr int kWarpTile = 64;            // of both
constexpr int kThreads = 128;            // 2x2 warps
constexpr int kDepth = 64, kPieces = 4;  // columns of a stage, and its pieces of 16 bytes
constexpr int kStages = 3;               // two blocks fit the 100 KiB of 8.6 and 8.9
constexpr int kOperandBytes = kTile * kDepth;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
// D in shared memory, with a gap after each row that moves the next one to other banks.
constexpr int kOutRow = kTile + 8;
static_assert(kTile * kOutRow * 2 <= kSharedBytes && kSharedBytes <= 48 * 1024);
constexpr int kGroup = 8;  // tiles of B that all tokens are multiplied with before the next ones

constexpr int kRowTiles = kWarpTile / 16, kColumnTiles = kWarpTile / 8;  // of mma, of a warp

struct Problem {
  const int8_t* a;
  const int8_t* b;
  const float* a_scales;
  const float* b_scales;
  uint16_t* d;
  int64_t d_row_stride;
  int m, n, k;
  int m_tiles, n_tiles;
};

__device__ uint32_t piece_address(uint32_t operand, int row, int piece) {
  return operand + row * kDepth + (piece ^ row / 2 % kPieces) * 16;
}

// Copies 16 bytes, or stores zeros.
__device__ void copy16(uint32_t shared, const int8_t* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Begins to copy columns [column, column + kDepth) of the rows of a tile.
__device__ void copy_operand(uint32_t shared, const int8_t* matrix, int first_row, int rows, int k,
                             int column) {
#pragma unroll
  for (int i = 0; i < kTile * kPieces / kThreads; ++i) {
    const int item = i * kThreads + int(threadIdx.x), row = item / kPieces, piece = item % kPieces;
    const bool exists = first_row + row < rows && column + piece * 16 < k;
    const int64_t at = int64_t{first_row + row} * k + column + piece * 16;
    copy16(piece_address(shared, row, piece), matrix + (exists ? at : 0), exists);
  }
}

__device__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

__device__ void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__global__ void __launch_bounds__(kThreads, 2) int8_kernel(const Problem p) {
  extern __shared__ uint4 memory[];
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * kWarpTile, warp_column = warp % 2 * kWarpTile;

  const int group = int(blockIdx.x) / (kGroup * p.m_tiles);
  const int of_group = int(blockIdx.x) % (kGroup * p.m_tiles);
  const int width = min(kGroup, p.n_tiles - group * kGroup);
  const int first_row = of_group / width * kTile;
  const int first_column = (group * kGroup + of_group % width) * kTile;

  const int steps = (p.k + kDepth - 1) / kDepth;
  const auto copy_stage = [&](int step) {
    if (step < steps) {
      const uint32_t stage = shared + step % kStages * kStageBytes;
      copy_operand(stage, p.a, first_row, p.m, p.k, step * kDepth);
      copy_operand(stage + kOperandBytes, p.b, first_column, p.n, p.k, step * kDepth);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");  // an empty group keeps the count
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_stage(step);

  int32_t sums[kRowTiles][kColumnTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // the stage is there for all, and the one before it is used
    copy_stage(step + kStages - 1);
    const uint32_t a_stage = shared + step % kStages * kStageBytes;
    const uint32_t b_stage = a_stage + kOperandBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 columns
      uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = warp_row + i * 16 + lane % 16;
        load_matrices(a[i], piece_address(a_stage, row, half * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        const int row = warp_column + j * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b[j], piece_address(b_stage, row, half * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();  // D takes the place of the stages

  auto* const out = reinterpret_cast<uint16_t*>(memory);
  float of_columns[kColumnTiles][2];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const int column = min(first_column + warp_column + j * 8 + lane % 4 * 2, p.n - 2);
    const float2 scales = __ldg(reinterpret_cast<const float2*>(p.b_scales + column));
    of_columns[j][0] = scales.x, of_columns[j][1] = scales.y;
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = warp_row + i * 16 + below * 8 + lane / 4;
      const float of_row = __ldg(p.a_scales + min(first_row + row, p.m - 1));
      const auto value = [&](int j, int e) {
        const float sum = __int2float_rn(sums[i][j][below * 2 + e]);
        return __fmul_rn(__fmul_rn(sum, of_row), of_columns[j][e]);
      };
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const int column = warp_column + j * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(out + row * kOutRow + column) =
            round2(value(j, 0), value(j, 1));
      }
    }
  }
  __syncthreads();
  constexpr int kRowPieces = kTile / 8;  // of 16 bytes
#pragma unroll 4
  for (int i = 0; i < kTile * kRowPieces / kThreads; ++i) {
    const int item = i * kThreads + int(threadIdx.x);
    const int row = item / kRowPieces, column = item % kRowPieces * 8;
    if (first_row + row < p.m && first_column + column < p.n) {
      *reinterpret_cast<uint4*>(p.d + (first_row + row) * p.d_row_stride + first_column + column) =
          *reinterpret_cast<const uint4*>(out + row * kOutRow + column);
    }
  }
}

void run(const GemmTask& task, Workspace, CudaStream stream) {
  check_32_bit_sizes("int8_sm80", task);
  const int64_t m_tiles = ceil_div(task.m, kTile), n_tiles = ceil_div(task.n, kTile);
  const uint32_t tiles = checked_count(m_tiles * n_tiles);
  const Problem problem{static_cast<const int8_t*>(task.a.codes),
                        static_cast<const int8_t*>(task.b.codes),
                        static_cast<const float*>(task.a.scales),
                        static_cast<const float*>(task.b.scales),
                        static_cast<uint16_t*>(task.d),
                        task.d_row_stride,
                        static_cast<int>(task.m),
                        static_cast<int>(task.n),
                        static_cast<int>(task.k),
                        static_cast<int>(m_tiles),
                        static_cast<int>(n_tiles)};
  launch_with_shared_memory(int8_kernel, tiles, kThreads, kSharedBytes, stream, problem);
}

}  // namespace

const GemmImplementation kInt8SM80{nullptr, nullptr, run};

}  // namespace zimage_mxfp8::detail
