#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "gemm/dispatch/table.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // rows and columns of D that a block of threads computes, 4x4 per thread
constexpr int kDepth = static_cast<int>(kBlockSize);

// Elements [k, k + 8) of a row as float32, without the scale of a row.
__device__ void load_operand8(const GemmOperandTask& operand, int64_t row, int64_t k,
                              int64_t tiles_per_row, float (&out)[8]) {
  const int64_t at = row * operand.row_stride + k;
  if (operand.format == OperandFormat::kBFloat16) {
    const auto* elements = static_cast<const uint16_t*>(operand.codes);
    const auto values = load<BFloat16, true>(elements + at, 0, 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = BFloat16::widen(values.element[i]);
    return;
  }
  uint32_t byte = 127;
  if (operand.format == OperandFormat::kMXFP8) {
    byte = __ldg(static_cast<const uint8_t*>(operand.scales) +
                 scale_offset(row, k / kBlockSize, tiles_per_row));
  }
  const uint2 codes =
      __ldg(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(operand.codes) + at));
  const auto first = decode<Float32>({codes.x}, byte), second = decode<Float32>({codes.y}, byte);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = __uint_as_float(first.element[i]);
    out[4 + i] = __uint_as_float(second.element[i]);
  }
}

// The same of INT8 codes.
__device__ void load_operand8(const GemmOperandTask& operand, int64_t row, int64_t k, int64_t,
                              int32_t (&out)[8]) {
  const auto* codes = static_cast<const int8_t*>(operand.codes) + row * operand.row_stride + k;
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = __ldg(codes + i);
}

__device__ float add_product(float sum, float a, float b) {
  return __fadd_rn(sum, __fmul_rn(a, b));
}
__device__ int32_t add_product(int32_t sum, int32_t a, int32_t b) { return sum + a * b; }

__device__ float row_scale(const GemmOperandTask& operand, int64_t row) {
  return operand.format == OperandFormat::kRowScaled || operand.format == OperandFormat::kInt8
             ? static_cast<const float*>(operand.scales)[row]
             : 1.0f;
}

// `Sum` is int32_t for INT8, which is exact.
template <typename Type, typename Sum>
__global__ void __launch_bounds__(kThreads)
    reference_kernel(const GemmTask task, uint32_t tile_columns) {
  __shared__ Sum a[kDepth][kTile + 4], b[kDepth][kTile + 4];
  const int64_t row0 = int64_t(blockIdx.x / tile_columns) * kTile;
  const int64_t column0 = int64_t(blockIdx.x % tile_columns) * kTile;
  const int64_t tiles_per_row = ceil_div(task.k, 128);
  const int load_row = threadIdx.x / 4, load_k = threadIdx.x % 4 * 8;
  const int tile_row = threadIdx.x / 16 * 4, tile_column = threadIdx.x % 16 * 4;
  Sum sum[4][4] = {};
  for (int64_t k = 0; k < task.k; k += kDepth) {
    Sum from_a[8] = {}, from_b[8] = {};
    if (row0 + load_row < task.m) {
      load_operand8(task.a, row0 + load_row, k + load_k, tiles_per_row, from_a);
    }
    if (column0 + load_row < task.n) {
      load_operand8(task.b, column0 + load_row, k + load_k, tiles_per_row, from_b);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a[load_k + i][load_row] = from_a[i];
      b[load_k + i][load_row] = from_b[i];
    }
    __syncthreads();
    // In order of k for every element, so that the result does not depend on the device.
#pragma unroll 8
    for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[i][j] = add_product(sum[i][j], a[depth][tile_row + i], b[depth][tile_column + j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + tile_row + i;
    if (row >= task.m) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t column = column0 + tile_column + j;
      if (column >= task.n) continue;
      float value = __fmul_rn(__fmul_rn(static_cast<float>(sum[i][j]), row_scale(task.a, row)),
                              row_scale(task.b, column));
      if (task.bias) {
        value = __fadd_rn(value, BFloat16::widen(static_cast<const uint16_t*>(task.bias)[column]));
      }
      static_cast<typename Type::Storage*>(task.d)[row * task.d_row_stride + column] =
          Type::narrow(value);
    }
  }
}

void run(const GemmTask& task, Workspace, CudaStream stream) {
  const uint32_t columns = static_cast<uint32_t>(ceil_div(task.n, kTile));
  const uint32_t tiles = checked_count(ceil_div(task.m, kTile) * columns);
  if (tiles == 0) return;
  with_type(task.d_dtype, [&](auto type) {
    using Type = decltype(type);
    launch(task.a.format == OperandFormat::kInt8 ? reference_kernel<Type, int32_t>
                                                 : reference_kernel<Type, float>,
           tiles, kThreads, stream, task, columns);
  });
}

}  // namespace

const GemmImplementation kReference{nullptr, nullptr, run};

}  // namespace zimage_mxfp8::detail
