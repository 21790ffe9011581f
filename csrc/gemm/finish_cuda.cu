#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "gemm/finish.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr int kThreads = 256;

// A thread handles 16 bytes of D; N is a multiple of 8 and rows are aligned.
template <typename Type>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* source, int64_t source_row_stride, const GemmTask task,
                  uint32_t items) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const uint32_t per_row = task.n / kWidth<Type>;
  const int64_t row = item / per_row, column = int64_t(item % per_row) * kWidth<Type>;
  Elements<Float32> sums[kWidth<Type> / 4];
#pragma unroll
  for (int i = 0; i < kWidth<Type> / 4; ++i) {
    // Not through the read-only cache: it may be D itself.
    sums[i].vector = reinterpret_cast<const uint4*>(source + row * source_row_stride + column)[i];
  }
  Elements<Type> result;
#pragma unroll
  for (int i = 0; i < kWidth<Type>; ++i) {
    float value = __uint_as_float(sums[i / 4].element[i % 4]);
    if (task.bias) value += BFloat16::widen(static_cast<const uint16_t*>(task.bias)[column + i]);
    result.element[i] = Type::narrow(value);
  }
  auto* target = static_cast<typename Type::Storage*>(task.d) + row * task.d_row_stride;
  store<Type, true>(result, target, column, task.n);
}

}  // namespace

void gemm_finish(const float* source, int64_t source_row_stride, const GemmTask& task,
                 CudaStream stream) {
  with_type(task.d_dtype, [&](auto type) {
    using Type = decltype(type);
    const uint32_t items = checked_count(task.m * (task.n / kWidth<Type>));
    if (items == 0) return;
    launch(finish_kernel<Type>, grid_for(items, kThreads), kThreads, stream, source,
           source_row_stride, task, items);
  });
}

}  // namespace zimage_mxfp8::detail
