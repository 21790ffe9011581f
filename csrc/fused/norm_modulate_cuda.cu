#include "cuda/reduce.cuh"
#include "fused/fused_cuda.h"
#include "fused/store_row.cuh"

namespace zimage_mxfp8::detail {
namespace {

// NormWeights as a kernel reads them.
struct NormTask {
  const uint16_t* weight;
  const uint16_t* modulation;  // null: none
  int64_t row_stride;
  uint32_t items;

  explicit NormTask(const NormWeights& norm) : weight(static_cast<const uint16_t*>(norm.weight)) {
    if (!norm.modulation) {
      modulation = nullptr, row_stride = 0, items = 0;
      return;
    }
    modulation = static_cast<const uint16_t*>(norm.modulation->data);
    row_stride = norm.modulation->row_stride;
    items = checked_count(norm.modulation->rows);
  }

  __device__ bool has(uint32_t item) const { return !modulation || item < items; }

  // Eight elements of an item's modulation, zeros without one. An item out of range reads the first
  // item's.
  template <bool whole>
  __device__ Chunk modulation8(uint32_t item, int column, int cols) const {
    const int64_t offset = item < items ? item * row_stride : 0;
    return load_chunk<whole>(modulation + offset, column, modulation ? cols : 0);
  }
};

// 1 / the root mean square of a row; NaN for an item out of range.
__device__ float inverse_root_mean(float sum_of_squares, int cols, float eps, bool has_item) {
  const float mean = __fdividef(sum_of_squares, static_cast<float>(cols));
  return has_item ? rsqrtf(__fadd_rn(mean, eps)) : __uint_as_float(kNaNBits);
}

// tanh to 2^-17. tanhf is several times as long, tanh.approx not precise enough for BF16.
__device__ float gate_tanh(float x) {
  const float decay = __expf(-2.0f * fabsf(x));
  const float large = copysignf(__fdividef(1.0f - decay, 1.0f + decay), x);
  const float small = __fmaf_rn(__fmul_rn(x, x) * (-1.0f / 3.0f), x, x);  // next: x^5 * 2/15
  return fabsf(x) < 0x1p-4f ? small : large;
}

// Writes RMSNorm(x) * weight * (1 + modulation) of a row that the block holds.
template <typename Layout, bool whole, typename Target>
__device__ void norm_row(const Chunk (&x)[Layout::kChunks], const NormTask& norm, uint32_t item,
                         float eps, const Target& target, int64_t row) {
  const int cols = static_cast<int>(target.cols);
  // The row's factor comes last and is not negative, so the largest result is the factor times the
  // largest product, whatever the rounding in between: one reduction is enough.
  float product[Layout::kChunks][8];
  SumMax local{0.0f, 0};
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    const int column = Layout::column(i);
    const Chunk weight = load_chunk<whole>(norm.weight, column, cols);
    const Chunk modulation = norm.modulation8<whole>(item, column, cols);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float value = BFloat16::widen(x[i].element[e]);
      const float modulated = __fmul_rn(BFloat16::widen(weight.element[e]),
                                        __fadd_rn(1.0f, BFloat16::widen(modulation.element[e])));
      local.sum = __fmaf_rn(value, value, local.sum);
      product[i][e] = __fmul_rn(value, modulated);
      if constexpr (kIsRowScaled<Target>) {
        local.max = max(local.max, __float_as_uint(product[i][e]) & 0x7FFFFFFF);
      }
    }
  }
  __shared__ SumMax of_warp[Layout::kWarps];
  const SumMax total = block_sum_max(local, of_warp);
  const float factor = inverse_root_mean(total.sum, cols, eps, norm.has(item));
  Chunk result[Layout::kChunks];
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) product[i][e] = __fmul_rn(product[i][e], factor);
    result[i] = round8(product[i]);
  }
  const uint16_t largest = BFloat16::narrow(__fmul_rn(__uint_as_float(total.max), factor));
  store_row<Layout, whole>(target, row, result, uint32_t{largest} << 16 & 0x7FFFFFFF);
}

__device__ uint32_t item_of(Items items, int64_t row) { return items ? __ldg(items + row) : 0; }

template <typename Layout, bool whole, typename Target>
__global__ void __launch_bounds__(Layout::kThreads)
    norm_modulate_kernel(const ConstMatrixView x, const NormTask norm, Items items, float eps,
                         const Target target) {
  const int64_t row = blockIdx.x;
  if (store_padding<Layout>(target, row)) return;
  Chunk values[Layout::kChunks];
  load_row<Layout, whole>(values, static_cast<const uint16_t*>(x.data) + row * x.row_stride,
                          int(x.cols));
  norm_row<Layout, whole>(values, norm, item_of(items, row), eps, target, row);
}

// Replaces the target if no norm follows.
struct NoTarget {
  int64_t rows;
};
uint32_t blocks_for(const NoTarget& target) { return checked_count(target.rows); }

template <typename Layout, bool whole, typename Target>
__global__ void __launch_bounds__(Layout::kThreads)
    add_norm_modulate_kernel(const MatrixView x, const ConstMatrixView y, const NormTask norm,
                             const NormTask next, Items items, float eps, const Target target) {
  const int64_t row = blockIdx.x;
  if (store_padding<Layout>(target, row)) return;
  const uint32_t item = item_of(items, row);
  const int cols = static_cast<int>(x.cols);
  uint16_t* x_row = static_cast<uint16_t*>(x.data) + row * x.row_stride;
  Chunk values[Layout::kChunks], added[Layout::kChunks];
  load_row<Layout, whole>(added, static_cast<const uint16_t*>(y.data) + row * y.row_stride, cols);
  load_row<Layout, whole>(values, x_row, cols);

  float product[Layout::kChunks][8];
  SumMax local{0.0f, 0};
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    const int column = Layout::column(i);
    const Chunk weight = load_chunk<whole>(norm.weight, column, cols);
    const Chunk gate = norm.modulation8<whole>(item, column, cols);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float value = BFloat16::widen(added[i].element[e]);
      float gated = BFloat16::widen(weight.element[e]);
      if (norm.modulation) {
        gated = __fmul_rn(gated, gate_tanh(BFloat16::widen(gate.element[e])));
      }
      local.sum = __fmaf_rn(value, value, local.sum);
      product[i][e] = __fmul_rn(value, gated);
    }
  }
  __shared__ SumMax of_warp[Layout::kWarps];
  const float sum = block_sum_max(local, of_warp).sum;
  const float factor = inverse_root_mean(sum, cols, eps, norm.has(item));
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      product[i][e] = __fmaf_rn(product[i][e], factor, BFloat16::widen(values[i].element[e]));
    }
    values[i] = round8(product[i]);
    store_chunk<whole>(values[i], x_row, Layout::column(i), cols);
  }
  if constexpr (!std::is_same_v<Target, NoTarget>) {
    norm_row<Layout, whole>(values, next, item, eps, target, row);
  }
}

bool has_whole_chunks(const NormWeights& norm) {
  return reinterpret_cast<uintptr_t>(norm.weight) % 16 == 0 &&
         (!norm.modulation || detail::has_whole_chunks(*norm.modulation));
}

}  // namespace

void norm_modulate_cuda(const ConstMatrixView& x, const NormWeights& norm, Items items, float eps,
                        const ActivationView& activation, CudaStream stream) {
  std::visit(
      [&](const auto& target) {
        const bool all_whole = detail::has_whole_chunks(x) && has_whole_chunks(norm) &&
                               detail::has_whole_chunks(target);
        with_row_layout(x.cols, all_whole, [&](auto layout, auto whole) {
          using Layout = decltype(layout);
          using Target = std::decay_t<decltype(target)>;
          launch(norm_modulate_kernel<Layout, decltype(whole)::value, Target>, blocks_for(target),
                 Layout::kThreads, stream, x, NormTask(norm), items, eps, target);
        });
      },
      activation);
}

void add_norm_modulate_cuda(const MatrixView& x, const ConstMatrixView& y, const NormWeights& norm,
                            const std::optional<NextNorm>& next, Items items, float eps,
                            CudaStream stream) {
  const bool addition_whole =
      detail::has_whole_chunks(x) && detail::has_whole_chunks(y) && has_whole_chunks(norm);
  const auto start = [&](const NormTask& next_task, const auto& target, bool all_whole) {
    with_row_layout(x.cols, all_whole, [&](auto layout, auto whole) {
      using Layout = decltype(layout);
      using Target = std::decay_t<decltype(target)>;
      launch(add_norm_modulate_kernel<Layout, decltype(whole)::value, Target>, blocks_for(target),
             Layout::kThreads, stream, x, y, NormTask(norm), next_task, items, eps, target);
    });
  };
  if (!next) return start(NormTask(NormWeights{}), NoTarget{x.rows}, addition_whole);
  std::visit(
      [&](const auto& target) {
        start(NormTask(next->norm), target,
              addition_whole && has_whole_chunks(next->norm) && detail::has_whole_chunks(target));
      },
      next->target);
}

}  // namespace zimage_mxfp8::detail
