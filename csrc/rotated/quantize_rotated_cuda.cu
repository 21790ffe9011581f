#include "cuda/launch.cuh"
#include "fused/store_row.cuh"
#include "rotated/quantize_rotated_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

template <typename Layout, bool whole>
__global__ void __launch_bounds__(Layout::kThreads)
    quantize_rotated_kernel(const ConstMatrixView source, const Int8View target) {
  const int64_t row = blockIdx.x;
  Chunk values[Layout::kChunks];
  load_row<Layout, whole>(values, row_of(source, row), int(source.cols));
  store_row<Layout, whole>(target, row, values, 0);
}

}  // namespace

void quantize_rotated_cuda(const ConstMatrixView& source, const Int8View& target,
                           CudaStream stream) {
  with_row_layout(source.cols, has_whole_chunks(source), [&](auto layout, auto whole) {
    using Layout = decltype(layout);
    launch(quantize_rotated_kernel<Layout, decltype(whole)::value>, blocks_for(target),
           Layout::kThreads, stream, source, target);
  });
}

}  // namespace zimage_mxfp8::detail
