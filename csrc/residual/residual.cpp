#include "zimage_mxfp8/residual.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace zimage_mxfp8 {
namespace {

detail::ResidualTask make_task(const ConstMatrixView& original, const ConstMXFP8View& quantized) {
  detail::check_pair(original, quantized, "the original");
  return {original.data,    original.dtype, original.row_stride, quantized.codes,
          quantized.scales, quantized.rows, quantized.cols};
}

}  // namespace

ResidualStats measure_residual(const ConstMatrixView& original, const ConstMXFP8View& quantized,
                               int threads) {
  const detail::ResidualTask task = make_task(original, quantized);
  const detail::Kernels& kernels = detail::active_kernels();
  // One partial sum per 128 rows, added in order: threads do not change the result.
  const std::int64_t group = 128, groups = ceil_div(original.rows, group);
  std::vector<detail::ResidualSums> partial(static_cast<std::size_t>(groups));
  detail::parallel_for(groups, detail::row_grain(original.cols * group), threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t i = begin; i < end; ++i) {
                           partial[static_cast<std::size_t>(i)] = kernels.residual_sums(
                               task, i * group, std::min((i + 1) * group, original.rows));
                         }
                       });
  ResidualStats stats;
  for (const detail::ResidualSums& sums : partial) {
    stats.squared_error += sums.squared_error;
    stats.squared_signal += sums.squared_signal;
    stats.max_error = std::max(stats.max_error, sums.max_error);
  }
  return stats;
}

void residual_times_vector(const ConstMatrixView& original, const ConstMXFP8View& quantized,
                           const double* x, double* out, int threads) {
  const detail::ResidualTask task = make_task(original, quantized);
  if ((!x && original.cols > 0) || (!out && original.rows > 0)) {
    throw InvalidArgument("x or out is a null pointer");
  }
  const detail::Kernels& kernels = detail::active_kernels();
  detail::parallel_for(original.rows, detail::row_grain(original.cols), threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         kernels.residual_dot(task, x, out, begin, end);
                       });
}

}  // namespace zimage_mxfp8
