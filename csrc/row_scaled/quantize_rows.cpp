#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"
#include "row_scaled/quantize_rows_cuda.h"
#include "zimage_mxfp8/row_scaled.h"

namespace zimage_mxfp8 {
namespace {

struct Checked {
  detail::QuantizeRowsTask task;
  detail::MemoryRange source, codes, scales;
};

Checked check(const ConstMatrixView& source, const RowScaledView& target) {
  detail::check_matrix(source, "the source");
  if (source.rows != target.rows || source.cols != target.cols) {
    throw InvalidArgument("the source is " + detail::shape_text(source.rows, source.cols) +
                          " but the row-scaled matrix is " +
                          detail::shape_text(target.rows, target.cols));
  }
  if ((!target.codes && source.rows * source.cols > 0) || (!target.scales && source.rows > 0)) {
    throw InvalidArgument("the codes or the scales of the row-scaled matrix are a null pointer");
  }
  const Checked checked{
      {source.data, source.dtype, source.row_stride, source.rows, source.cols, target.codes,
       target.scales},
      detail::range_of(source, "the source"),
      {target.codes, target.rows * target.cols, "codes"},
      {target.scales, target.rows * static_cast<std::int64_t>(sizeof(float)), "scales"}};
  detail::check_disjoint(checked.codes, {checked.source, checked.scales});
  detail::check_disjoint(checked.scales, {checked.source});
  detail::check_alignment(checked.scales, sizeof(float));
  return checked;
}

}  // namespace

void quantize_rows(const ConstMatrixView& source, const RowScaledView& target, CudaStream stream) {
  const Checked checked = check(source, target);
  detail::check_alignment(checked.source, element_size(source.dtype));
  detail::check_alignment(checked.codes, 16);
  detail::check_device_memory({checked.source, checked.codes, checked.scales});
  detail::quantize_rows_cuda(checked.task, stream);
}

void quantize_rows(const ConstMatrixView& source, const RowScaledView& target, int threads) {
  const detail::QuantizeRowsTask task = check(source, target).task;
  const detail::Kernels& kernels = detail::active_kernels();
  detail::parallel_for(
      source.rows, detail::row_grain(source.cols), threads,
      [&](std::int64_t begin, std::int64_t end) { kernels.quantize_rows(task, begin, end); });
}

}  // namespace zimage_mxfp8
