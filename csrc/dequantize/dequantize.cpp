#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"
#include "dequantize/dequantize_cuda.h"
#include "zimage_mxfp8/quantize.h"

namespace zimage_mxfp8 {
namespace {

detail::DequantizeTask make_task(const ConstMXFP8View& source, const MatrixView& target) {
  detail::check_pair(target, source, "the target");
  const detail::PairRanges memory(target, source, "the target");
  detail::check_disjoint(memory.plain, {memory.codes, memory.scales});
  return {source.codes, source.scales, source.rows,      source.cols,
          target.data,  target.dtype,  target.row_stride};
}

}  // namespace

void dequantize(const ConstMXFP8View& source, const MatrixView& target, CudaStream stream) {
  const detail::DequantizeTask task = make_task(source, target);
  detail::check_device_pair({target, source, "the target"}, target.dtype);
  detail::dequantize_cuda(task, stream);
}

void dequantize(const ConstMXFP8View& source, const MatrixView& target, int threads) {
  const detail::DequantizeTask task = make_task(source, target);
  const detail::Kernels& kernels = detail::active_kernels();
  detail::parallel_for(
      source.rows, detail::row_grain(source.cols), threads,
      [&](std::int64_t begin, std::int64_t end) { kernels.dequantize_rows(task, begin, end); });
}

}  // namespace zimage_mxfp8
