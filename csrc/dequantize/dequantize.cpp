#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "zimage_mxfp8/quantize.h"

namespace zimage_mxfp8 {

void dequantize(const ConstMXFP8View& source, const MatrixView& target, int threads) {
  detail::check_pair(target, source, "the target");
  const detail::DequantizeTask task{source.codes, source.scales, source.rows,      source.cols,
                                    target.data,  target.dtype,  target.row_stride};
  const detail::Kernels& kernels = detail::active_kernels();
  detail::parallel_for(
      source.rows, detail::row_grain(source.cols), threads,
      [&](std::int64_t begin, std::int64_t end) { kernels.dequantize_rows(task, begin, end); });
}

}  // namespace zimage_mxfp8
