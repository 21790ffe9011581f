#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "fused/fused_cuda.h"
#include "fused/row.cuh"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;  // of one head, 8 elements each
constexpr int kGroups = kThreads / kLanes;
constexpr int kInFlight = 4;  // heads that a group loads together: Z-Image's 60 in one round

static_assert(kHeadSize == 8 * kLanes);

// One block per row; it keeps the row's rotations for all heads.
template <bool whole>
__global__ void __launch_bounds__(kThreads, whole ? 4 : 2)
    rotate_heads_kernel(const MatrixView matrix, const uint16_t* q_weight, const uint16_t* k_weight,
                        const ConstMatrixView rotations, int q_heads, int heads, float eps) {
  const int64_t row = blockIdx.x;
  const int group = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
  const auto* rotation_row =
      static_cast<const uint32_t*>(rotations.data) + row * rotations.row_stride;
  // Four pairs of cosine and sine.
  const Elements<Float32> rotations4[2] = {load<Float32, whole>(rotation_row + column, 0, 4),
                                           load<Float32, whole>(rotation_row + column + 4, 0, 4)};
  const Chunk weights[2] = {load_chunk<whole>(q_weight + column, 0, 8),
                            load_chunk<whole>(k_weight + column, 0, 8)};
  uint16_t* qk = static_cast<uint16_t*>(matrix.data) + row * matrix.row_stride;

  for (int begin = 0; begin < heads; begin += kGroups * kInFlight) {
    const auto head_of = [&](int i) { return begin + i * kGroups + group; };
    const auto size_of = [&](int i) { return head_of(i) < heads ? int(kHeadSize) : 0; };
    Chunk values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      values[i] = load_chunk<whole>(qk + head_of(i) * kHeadSize, column, size_of(i));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      float product[8], sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float value = BFloat16::widen(values[i].element[e]);
        const uint16_t weight =
            head_of(i) < q_heads ? weights[0].element[e] : weights[1].element[e];
        sum = __fmaf_rn(value, value, sum);
        product[e] = __fmul_rn(value, BFloat16::widen(weight));
      }
      const float mean = lane_sum<kLanes>(sum) * (1.0f / kHeadSize);
      const float factor = rsqrtf(__fadd_rn(mean, eps));
      float rotated[8];
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const float2 normed = {__fmul_rn(product[e], factor), __fmul_rn(product[e + 1], factor)};
        const uint32_t* pair = rotations4[e / 4].element + e % 4;
        const float2 result = rotate(normed, {__uint_as_float(pair[0]), __uint_as_float(pair[1])});
        rotated[e] = result.x;
        rotated[e + 1] = result.y;
      }
      store_chunk<whole>(round8(rotated), qk + head_of(i) * kHeadSize, column, size_of(i));
    }
  }
}

}  // namespace

void rotate_heads_cuda(const MatrixView& matrix, const void* q_weight, const void* k_weight,
                       const ConstMatrixView& rotations, int64_t q_heads, int64_t k_heads,
                       float eps, CudaStream stream) {
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool whole = has_whole_chunks(matrix) && has_whole_chunks(rotations) &&
                     is_aligned(q_weight) && is_aligned(k_weight);
  launch(whole ? rotate_heads_kernel<true> : rotate_heads_kernel<false>, checked_count(matrix.rows),
         kThreads, stream, matrix, static_cast<const uint16_t*>(q_weight),
         static_cast<const uint16_t*>(k_weight), rotations, static_cast<int>(q_heads),
         static_cast<int>(q_heads + k_heads), eps);
}

}  // namespace zimage_mxfp8::detail
