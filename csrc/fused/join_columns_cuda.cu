#include "cuda/reduce.cuh"
#include "fused/fused_cuda.h"
#include "fused/store_row.cuh"

namespace zimage_mxfp8::detail {
namespace {

// Loads elements [column, column + 8) of two rows side by side. In rows of `whole` chunks each
// chunk is of one row.
template <bool whole>
__device__ Chunk load_joined(const uint16_t* left, int left_cols, const uint16_t* right,
                             int right_cols, int column) {
  if constexpr (whole) {
    return column < left_cols ? load_chunk<true>(left, column, left_cols)
                              : load_chunk<true>(right, column - left_cols, right_cols);
  } else {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = column + i, of_right = at - left_cols;
      chunk.element[i] = of_right < 0 ? left[at] : of_right < right_cols ? right[of_right] : 0;
    }
    return chunk;
  }
}

template <typename Layout, bool whole, typename Target>
__global__ void __launch_bounds__(Layout::kThreads)
    join_columns_kernel(const ConstMatrixView left, const ConstMatrixView right,
                        const Target target) {
  const int64_t row = blockIdx.x;
  if (store_padding<Layout>(target, row)) return;
  Chunk values[Layout::kChunks];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    values[i] = load_joined<whole>(row_of(left, row), int(left.cols), row_of(right, row),
                                   int(right.cols), Layout::column(i));
  }
  if constexpr (kIsRowScaled<Target>) {
#pragma unroll
    for (int i = 0; i < Layout::kChunks; ++i) amax = max(amax, magnitude<BFloat16>(values[i]));
    __shared__ uint32_t of_warp[Layout::kWarps];
    amax = block_max(amax, of_warp);
  }
  store_row<Layout, whole>(target, row, values, amax);
}

}  // namespace

void join_columns_cuda(const ConstMatrixView& left, const ConstMatrixView& right,
                       const ActivationView& activation, CudaStream stream) {
  std::visit(
      [&](const auto& target) {
        using Target = std::decay_t<decltype(target)>;
        const bool whole =
            has_whole_chunks(left) && has_whole_chunks(right) && has_whole_chunks(target);
        with_row_layout(left.cols + right.cols, whole, [&](auto layout, auto is_whole) {
          using Layout = decltype(layout);
          launch(join_columns_kernel<Layout, decltype(is_whole)::value, Target>, blocks_for(target),
                 Layout::kThreads, stream, left, right, target);
        });
      },
      activation);
}

}  // namespace zimage_mxfp8::detail
