#include "gemm/sm90/narrow.h"

#include <string>

#include "check.h"
#include "cuda/runtime.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8 {

void narrow_gemm(const ConstRowScaledView& a, const ConstRowScaledView& b, const float* factors,
                 const MatrixView& d, CudaStream stream) {
  detail::check_matrix(d, "D");
  if (a.rows < 0 || a.cols < 1 || a.cols % kBlockSize != 0 || a.rows > (std::int64_t{1} << 30) ||
      a.cols > (std::int64_t{1} << 30)) {
    throw InvalidArgument("A is " + detail::shape_text(a.rows, a.cols) +
                          ": its width must be a multiple of 32, and both below 2^30");
  }
  const std::int64_t rank = b.rows / 2;
  if (b.cols != a.cols || b.rows < 1 || b.rows % (2 * detail::kNarrowRows) != 0) {
    throw InvalidArgument("B is " + detail::shape_text(b.rows, b.cols) + ": it must have " +
                          std::to_string(a.cols) + " columns and a multiple of " +
                          std::to_string(2 * detail::kNarrowRows) + " rows, two for each of D");
  }
  if (d.dtype != DType::kBFloat16 || d.rows != a.rows || d.cols != rank) {
    throw InvalidArgument("D must be BF16 " + detail::shape_text(a.rows, rank));
  }
  const detail::MemoryRange codes{a.codes, a.rows * a.cols, "A"},
      weights{b.codes, b.rows * b.cols, "B"},
      target = detail::range_of(d, "D"),
      scales = detail::required_range(b.scales, b.rows * 4, 16, "the scales of B"),
      of_rows = detail::required_range(factors, rank * 4, 16, "the factors");
  detail::check_rows(codes, a.cols, 1);
  detail::check_rows(weights, b.cols, 1);
  detail::check_rows(target, d.rows > 1 ? d.row_stride : d.cols, 2);
  detail::check_disjoint(target, {codes, weights, scales, of_rows});
  detail::check_device_memory({codes, weights, scales, of_rows, target});
  const CudaDevice& device = detail::find_device(detail::current_device());
  if (device.major != 9 || device.minor != 0) {
    throw Unsupported("narrow GEMMs need compute capability 9.0, and this is " + device.name);
  }
  if (a.rows > 0) detail::narrow_gemm_sm90(a, b, factors, d, stream);
}

}  // namespace zimage_mxfp8
