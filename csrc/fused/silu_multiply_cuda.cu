#include "cuda/reduce.cuh"
#include "fused/fused_cuda.h"
#include "fused/store_row.cuh"

namespace zimage_mxfp8::detail {
namespace {

// Z-Image's 10240 columns exactly.
using FeedForwardRow = RowLayout<256, 5>;

template <typename Layout, bool whole, typename Target>
__global__ void __launch_bounds__(Layout::kThreads)
    silu_multiply_kernel(const ConstMatrixView gate, const ConstMatrixView up,
                         const Target target) {
  const int64_t row = blockIdx.x;
  if (store_padding<Layout>(target, row)) return;
  Chunk gates[Layout::kChunks], ups[Layout::kChunks];
  load_row<Layout, whole>(gates, row_of(gate, row), int(gate.cols));
  load_row<Layout, whole>(ups, row_of(up, row), int(up.cols));
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < Layout::kChunks; ++i) {
    float product[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      product[e] =
          __fmul_rn(silu(BFloat16::widen(gates[i].element[e])), BFloat16::widen(ups[i].element[e]));
    }
    gates[i] = round8(product);
    if constexpr (kIsRowScaled<Target>) amax = max(amax, magnitude<BFloat16>(gates[i]));
  }
  if constexpr (kIsRowScaled<Target>) {
    __shared__ uint32_t of_warp[Layout::kWarps];
    amax = block_max(amax, of_warp);
  }
  store_row<Layout, whole>(target, row, gates, amax);
}

template <typename Layout, bool whole, typename Target>
void start(const ConstMatrixView& gate, const ConstMatrixView& up, const Target& target,
           CudaStream stream) {
  launch(silu_multiply_kernel<Layout, whole, Target>, blocks_for(target), Layout::kThreads, stream,
         gate, up, target);
}

}  // namespace

void silu_multiply_cuda(const ConstMatrixView& gate, const ConstMatrixView& up,
                        const ActivationView& activation, CudaStream stream) {
  std::visit(
      [&](const auto& target) {
        if (!has_whole_chunks(gate) || !has_whole_chunks(up) || !has_whole_chunks(target)) {
          start<WidestRow, false>(gate, up, target, stream);
        } else if (gate.cols <= FeedForwardRow::kColumns) {
          start<FeedForwardRow, true>(gate, up, target, stream);
        } else {
          start<WidestRow, true>(gate, up, target, stream);
        }
      },
      activation);
}

}  // namespace zimage_mxfp8::detail
