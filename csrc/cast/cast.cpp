#include "zimage_mxfp8/cast.h"

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace zimage_mxfp8 {

void cast(const ConstMatrixView& source, const MatrixView& target, int threads) {
  detail::check_matrix(source, "the source");
  detail::check_matrix(target, "the target");
  if (source.rows != target.rows || source.cols != target.cols) {
    throw InvalidArgument("the source is " + detail::shape_text(source.rows, source.cols) +
                          " but the target is " + detail::shape_text(target.rows, target.cols));
  }
  const detail::Kernels& kernels = detail::active_kernels();
  const auto offset = [](std::int64_t row, std::int64_t stride, DType dtype) {
    return row * stride * static_cast<std::int64_t>(element_size(dtype));
  };
  detail::parallel_for(
      source.rows, detail::row_grain(source.cols), threads,
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          kernels.cast_row(
              static_cast<const char*>(source.data) + offset(row, source.row_stride, source.dtype),
              source.dtype,
              static_cast<char*>(target.data) + offset(row, target.row_stride, target.dtype),
              target.dtype, source.cols);
        }
      });
}

}  // namespace zimage_mxfp8
