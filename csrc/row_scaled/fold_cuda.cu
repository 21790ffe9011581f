#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "row_scaled/encode_row.cuh"
#include "row_scaled/fold_cuda.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 32 * 8;  // columns that a warp works on at a time
constexpr uint32_t kNoBlock = ~0u;
// A code that is not zero has room for 17 doublings at most, and is zero after 19 halvings, so
// that factors beyond these, which may overflow, change nothing.
constexpr int kMaxUp = 17, kMaxDown = 19;

// 2^(2 * exponent) for exponents of scales.
__device__ double squared_scale(int exponent) {
  return __hiloint2double((1023 + 2 * exponent) << 20, 0);
}

__device__ double warp_sum(double value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// The largest magnitude of eight codes.
__device__ uint32_t largest8(uint2 codes) {
  uint32_t largest = __vmaxu4(codes.x & 0x7F7F7F7F, codes.y & 0x7F7F7F7F);
  largest = __vmaxu4(largest, largest >> 16);
  return __vmaxu4(largest, largest >> 8) & 0x7F;
}

// One warp per row. Float32 arithmetic is exact here: values have four bits, and all factors are
// powers of two.
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const ConstMXFP8View source, const RowScaledView target, FoldRowStats* stats) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= source.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t code_cols = round_up(source.cols, kBlockSize);
  const int64_t tiles_per_row = ceil_div(source.cols, 128);
  const uint8_t* row_codes = source.codes + row * code_cols;
  const auto codes_at = [&](int64_t column) {
    return __ldg(reinterpret_cast<const uint2*>(row_codes + column));
  };
  const auto byte_at = [&](int64_t column) {
    return int(__ldg(source.scales + scale_offset(row, column / kBlockSize, tiles_per_row)));
  };

  // The smallest scale that no block overflows; at least 2^-126, a float32 normal.
  int row_byte = 1;
  uint32_t nan_block = kNoBlock;
  for (int64_t column = lane * 8; column < code_cols; column += kStep) {
    const uint32_t largest = largest8(codes_at(column));
    const int byte = byte_at(column);
    if (largest == 0x7F || byte == 255) {
      nan_block = min(nan_block, uint32_t(column / kBlockSize));
    } else if (largest != 0) {
      row_byte = max(row_byte, byte - 127 + int(scale_byte(__float_as_uint(decode2(largest).x))));
    }
  }
  row_byte = __reduce_max_sync(~0u, row_byte);
  nan_block = __reduce_min_sync(~0u, nan_block);
  if (nan_block != kNoBlock) {
    if (lane == 0) {
      const int64_t first = int64_t{nan_block} * kBlockSize;
      const int64_t last = min(first + kBlockSize, source.cols) - 1;
      stats[row] = {double(first), double(last), double(__uint_as_float(kNaNBits))};
    }
    return;
  }
  if (lane == 0) target.scales[row] = power_of_two(row_byte - 127);

  uint32_t changed = 0;
  double squared_error = 0.0, squared_signal = 0.0;
  for (int64_t column = lane * 8; column < source.cols; column += kStep) {
    const uint2 codes = codes_at(column);
    const int byte = byte_at(column);
    const int shift = max(-kMaxUp, min(row_byte - byte, kMaxDown));
    const float down = power_of_two(-shift), up = power_of_two(shift);
    uint32_t moved[4];
    double error = 0.0, signal = 0.0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = decode2((i < 2 ? codes.x : codes.y) >> 16 * (i % 2));
      moved[i] = __nv_cvt_float2_to_fp8x2(make_float2(value.x * down, value.y * down),
                                          __NV_SATFINITE, __NV_E4M3);
      const float2 back = decode2(moved[i]);
      const float differences[2] = {value.x - back.x * up, value.y - back.y * up};
      const float values[2] = {value.x, value.y};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column + 2 * i + e < source.cols) {
          changed += differences[e] != 0.0f;
          error += double(differences[e]) * differences[e];
          signal += double(values[e]) * values[e];
        }
      }
    }
    Codes<BFloat16> folded;  // eight, as many as BF16 has in 16 bytes
    folded.word[0] = moved[0] | moved[1] << 16;
    folded.word[1] = moved[2] | moved[3] << 16;
    store_codes<BFloat16>(folded, target.codes + row * source.cols, column, source.cols);
    const double scale = squared_scale(byte - 127);
    squared_error += error * scale;
    squared_signal += signal * scale;
  }
  changed = __reduce_add_sync(~0u, changed);
  squared_error = warp_sum(squared_error);
  squared_signal = warp_sum(squared_signal);
  if (lane == 0) stats[row] = {double(changed), squared_error, squared_signal};
}

}  // namespace

void fold_cuda(const ConstMXFP8View& source, const RowScaledView& target, FoldRowStats* stats,
               CudaStream stream) {
  checked_count(source.cols);  // blocks are counted in 32 bits
  launch(fold_kernel, grid_for(checked_count(source.rows), kThreads / 32), kThreads, stream, source,
         target, stats);
}

}  // namespace zimage_mxfp8::detail
