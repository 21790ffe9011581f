#include <algorithm>

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

// Rows of whole chunks of up to Z-Image's 3840 columns. The kernels of this file share it, because
// it orders the sums.
using NormRow = RowLayout<160, 3>;

// RMSNorm's weights for the rows of an item, combined with the item's modulation.
template <typename Layout, bool whole, typename Combine>
struct Factors {
  const NormTask& norm;
  uint32_t item;
  int cols;

  __device__ void load(float (&factors)[8], int chunk) const {
    const int column = Layout::column(chunk);
    const Chunk weight = load_chunk<whole>(norm.weight, column, cols);
    const Chunk modulation = norm.modulation8<whole>(item, column, cols);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      factors[e] = Combine::of(norm, BFloat16::widen(weight.element[e]),
                               BFloat16::widen(modulation.element[e]));
    }
  }
};

struct TimesOnePlus {
  static __device__ float of(const NormTask&, float weight, float modulation) {
    return __fmul_rn(weight, __fadd_rn(1.0f, modulation));
  }
};
template <typename Layout, bool whole>
using Scales = Factors<Layout, whole, TimesOnePlus>;

struct TimesTanh {
  static __device__ float of(const NormTask& norm, float weight, float modulation) {
    return norm.modulation ? __fmul_rn(weight, gate_tanh(modulation)) : weight;
  }
};
template <typename Layout, bool whole>
using Gates = Factors<Layout, whole, TimesTanh>;

// The factors of the item of the last row, in registers.
template <typename Layout>
class KeptFactors {
 public:
  template <bool whole, typename Combine>
  __device__ void update(const Factors<Layout, whole, Combine>& factors) {
    if (factors.item == item_) return;
    item_ = factors.item;
#pragma unroll
    for (int i = 0; i < Layout::kChunks; ++i) factors.load(kept_[i], i);
  }

  __device__ void load(float (&factors)[8], int chunk) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) factors[e] = kept_[chunk][e];
  }

 private:
  float kept_[Layout::kChunks][8];
  int64_t item_ = -1;  // none; items out of range may have any other number
};

// Writes x / root mean square * factors of a row that the block holds. `of_warp` is for the
// reduction.
template <typename Layout, bool whole, typename AnyFactors, typename Target>
__device__ void norm_row(const Chunk (&x)[Layout::kChunks], const AnyFactors& factors,
                         bool has_item, float eps, const Target& target, int64_t row,
                         SumMax (&of_warp)[Layout::kWarps]) {
  const int cols = static_cast<int>(target.cols);
  // The row's factor comes last and is not negative, so the largest result is the factor times the
  // largest product, whatever the rounding in between: one reduction is enough.
  float product[Layout::kChunks][8];
  SumMax local{0.0f, 0};
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    factors.load(product[i], i);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float value = BFloat16::widen(x[i].element[e]);
      local.sum = __fmaf_rn(value, value, local.sum);
      product[i][e] = __fmul_rn(value, product[i][e]);
      if constexpr (kIsRowScaled<Target>) {
        local.max = max(local.max, __float_as_uint(product[i][e]) & 0x7FFFFFFF);
      }
    }
  }
  const SumMax total = block_sum_max(local, of_warp);
  const float factor = inverse_root_mean(total.sum, cols, eps, has_item);
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
  const Scales<Layout, whole> scales{norm, item_of(items, row), int(x.cols)};
  __shared__ SumMax of_warp[Layout::kWarps];
  norm_row<Layout, whole>(values, scales, norm.has(scales.item), eps, target, row, of_warp);
}

// Replaces the target if no norm follows.
struct NoTarget {
  int64_t rows;
};
using detail::blocks_for;
uint32_t blocks_for(const NoTarget& target) { return checked_count(target.rows); }

// Whether blocks take several rows one after another, and load the next one meanwhile. Wider rows
// leave no registers for it.
template <typename Layout>
inline constexpr bool kTakesTurns = std::is_same_v<Layout, NormRow>;

// Says that there is no addend.
struct NoAddend {};

// Blocks for which a multiprocessor has registers.
template <typename Layout, typename Addend>
inline constexpr int kResidentBlocks = 1;
template <>
inline constexpr int kResidentBlocks<NormRow, NoAddend> = 3;
template <>
inline constexpr int kResidentBlocks<NormRow, ScaledMatrix> = 2;

template <typename Layout, bool whole, typename Addend, typename Target>
__global__ void __launch_bounds__(Layout::kThreads, (kResidentBlocks<Layout, Addend>))
    add_norm_modulate_kernel(const MatrixView x, const ConstMatrixView y, const NormTask norm,
                             const Addend addend, const NormTask next, Items items, float eps,
                             const Target target, const uint32_t rows) {
  constexpr bool has_addend = std::is_same_v<Addend, ScaledMatrix>;
  constexpr bool has_next = !std::is_same_v<Target, NoTarget>;
  __shared__ SumMax of_warp[2][2][Layout::kWarps];  // of even and odd turns
  const int cols = static_cast<int>(x.cols);
  const auto x_row = [&x](int64_t row) {
    return static_cast<uint16_t*>(x.data) + row * x.row_stride;
  };
  KeptFactors<Layout> kept_gates, kept_scales;
  Chunk next_added[Layout::kChunks], next_values[Layout::kChunks];
  const auto load = [&](int64_t row) {
    if (row >= x.rows) return;
    load_row<Layout, whole>(next_added, static_cast<const uint16_t*>(y.data) + row * y.row_stride,
                            cols);
    load_row<Layout, whole>(next_values, x_row(row), cols);
  };
  load(blockIdx.x);
  bool odd = false;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, odd = !odd) {
    if (store_padding<Layout>(target, row)) continue;
    const uint32_t item = item_of(items, row);
    const Gates<Layout, whole> gates{norm, item, cols};
    const Scales<Layout, whole> scales{next, item, cols};
    if constexpr (kTakesTurns<Layout>) {
      kept_gates.update(gates);
      if constexpr (has_next) kept_scales.update(scales);
    }
    float product[Layout::kChunks][8];
    Chunk values[Layout::kChunks];
    SumMax local{0.0f, 0};
#pragma unroll
    for (int i = 0; i < Layout::kChunks; ++i) {
      values[i] = next_values[i];
      if constexpr (kTakesTurns<Layout>) {
        kept_gates.load(product[i], i);
      } else {
        gates.load(product[i], i);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float value = BFloat16::widen(next_added[i].element[e]);
        local.sum = __fmaf_rn(value, value, local.sum);
        product[i][e] = __fmul_rn(value, product[i][e]);
      }
    }
    Chunk addends[has_addend ? Layout::kChunks : 1];
    float addend_factor = 0.0f;
    if constexpr (has_addend) {
      const ConstMatrixView& matrix = addend.matrix;
      load_row<Layout, whole>(
          addends, static_cast<const uint16_t*>(matrix.data) + row * matrix.row_stride, cols);
      addend_factor = __ldg(addend.factor);
    }
    if constexpr (kTakesTurns<Layout>) load(row + gridDim.x);
    const float sum = block_sum_max(local, of_warp[odd][0]).sum;
    const float factor = inverse_root_mean(sum, cols, eps, norm.has(item));
#pragma unroll
    for (int i = 0; i < Layout::kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        product[i][e] = __fmaf_rn(product[i][e], factor, BFloat16::widen(values[i].element[e]));
        if constexpr (has_addend) {
          const float added = BFloat16::widen(addends[i].element[e]);
          product[i][e] = __fmaf_rn(added, addend_factor, product[i][e]);
        }
      }
      values[i] = round8(product[i]);
      store_chunk<whole>(values[i], x_row(row), Layout::column(i), cols);
    }
    if constexpr (has_next) {
      const auto write = [&](const auto& factors) {
        norm_row<Layout, whole>(values, factors, next.has(item), eps, target, row, of_warp[odd][1]);
      };
      if constexpr (kTakesTurns<Layout>) {
        write(kept_scales);
      } else {
        write(scales);
      }
    }
    if constexpr (!kTakesTurns<Layout>) break;
  }
}

bool has_whole_chunks(const NormWeights& norm) {
  return reinterpret_cast<uintptr_t>(norm.weight) % 16 == 0 &&
         (!norm.modulation || detail::has_whole_chunks(*norm.modulation));
}

bool has_whole_chunks(const NoAddend&) { return true; }
bool has_whole_chunks(const ScaledMatrix& addend) {
  return detail::has_whole_chunks(addend.matrix);
}

}  // namespace

void norm_modulate_cuda(const ConstMatrixView& x, const NormWeights& norm, Items items, float eps,
                        const ActivationView& activation, CudaStream stream) {
  std::visit(
      [&](const auto& target) {
        const bool all_whole = detail::has_whole_chunks(x) && has_whole_chunks(norm) &&
                               detail::has_whole_chunks(target);
        with_row_layout<NormRow>(x.cols, all_whole, [&](auto layout, auto whole) {
          using Layout = decltype(layout);
          using Target = std::decay_t<decltype(target)>;
          launch(norm_modulate_kernel<Layout, decltype(whole)::value, Target>, blocks_for(target),
                 Layout::kThreads, stream, x, NormTask(norm), items, eps, target);
        });
      },
      activation);
}

namespace {

template <typename Addend>
void add_norm_modulate_with(const MatrixView& x, const ConstMatrixView& y, const NormWeights& norm,
                            const Addend& addend, const std::optional<NextNorm>& next, Items items,
                            float eps, CudaStream stream) {
  const bool addition_whole = detail::has_whole_chunks(x) && detail::has_whole_chunks(y) &&
                              has_whole_chunks(norm) && has_whole_chunks(addend);
  const auto start = [&](const NormTask& next_task, const auto& target, bool all_whole) {
    using Target = std::decay_t<decltype(target)>;
    with_row_layout<NormRow>(x.cols, all_whole, [&](auto layout, auto whole) {
      using Layout = decltype(layout);
      const uint32_t rows = blocks_for(target);
      uint32_t blocks = rows;
      if (kTakesTurns<Layout>) {
        const int resident = multiprocessors(current_device()) * kResidentBlocks<Layout, Addend>;
        blocks = std::min(rows, static_cast<uint32_t>(resident));
      }
      launch(add_norm_modulate_kernel<Layout, decltype(whole)::value, Addend, Target>, blocks,
             Layout::kThreads, stream, x, y, NormTask(norm), addend, next_task, items, eps, target,
             rows);
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

}  // namespace

void add_norm_modulate_cuda(const MatrixView& x, const ConstMatrixView& y, const NormWeights& norm,
                            const std::optional<ScaledMatrix>& addend,
                            const std::optional<NextNorm>& next, Items items, float eps,
                            CudaStream stream) {
  if (addend) return add_norm_modulate_with(x, y, norm, *addend, next, items, eps, stream);
  add_norm_modulate_with(x, y, norm, NoAddend{}, next, items, eps, stream);
}

}  // namespace zimage_mxfp8::detail
