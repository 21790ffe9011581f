#include "zimage_mxfp8/convrot.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "quantize/nonfinite.h"
#include "zimage_mxfp8/quantize.h"

namespace zimage_mxfp8 {
namespace {

void check_group(std::int64_t group, std::int64_t cols) {
  std::int64_t power = 1;
  while (power < group && power < kMaxConvrotGroup) power *= 4;
  if (power != group) {
    throw InvalidArgument("the rotation is in groups of " + std::to_string(group) +
                          " columns, which is no power of 4 up to " +
                          std::to_string(kMaxConvrotGroup));
  }
  if (cols % group != 0) {
    throw InvalidArgument("the rotation is in groups of " + std::to_string(group) +
                          " columns, which do not divide " + std::to_string(cols));
  }
}

template <typename Plain, typename Encoded>
struct Ranges {
  detail::MemoryRange plain, codes, scales;

  Ranges(const Plain& matrix, const Encoded& encoded, std::int64_t group, const char* what)
      : plain{}, codes{}, scales{} {
    detail::check_matrix(matrix, what);
    if (matrix.rows != encoded.rows || matrix.cols != encoded.cols) {
      throw InvalidArgument(
          std::string(what) + " is " + detail::shape_text(matrix.rows, matrix.cols) +
          " but the INT8 matrix is " + detail::shape_text(encoded.rows, encoded.cols));
    }
    check_group(group, matrix.cols);
    if ((!encoded.codes && matrix.rows * matrix.cols > 0) || (!encoded.scales && matrix.rows > 0)) {
      throw InvalidArgument("the codes or the scales of the INT8 matrix are a null pointer");
    }
    plain = detail::range_of(matrix, what);
    codes = {encoded.codes, encoded.rows * encoded.cols, "codes"};
    scales = {encoded.scales, encoded.rows * static_cast<std::int64_t>(sizeof(float)), "scales"};
    detail::check_alignment(scales, sizeof(float));
  }
};

// Calls `kernel(begin, end, scratch)` for ranges of rows that it takes at once.
template <typename Kernel>
void for_rows(std::int64_t rows, std::int64_t cols, std::int64_t scratch_floats, int threads,
              Kernel kernel) {
  const std::int64_t step = detail::kConvrotRows;
  detail::parallel_for(ceil_div(rows, step), detail::row_grain(cols * step), threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         const auto scratch =
                             std::make_unique<float[]>(static_cast<std::size_t>(scratch_floats));
                         for (std::int64_t i = begin; i < end; ++i) {
                           kernel(i * step, std::min((i + 1) * step, rows), scratch.get());
                         }
                       });
}

}  // namespace

void quantize_convrot(const ConstMatrixView& source, std::int64_t group, const Int8View& target,
                      int threads) {
  const Ranges memory(source, target, group, "the source");
  detail::check_disjoint(memory.codes, {memory.plain, memory.scales});
  detail::check_disjoint(memory.scales, {memory.plain});
  const detail::QuantizeConvrotTask task{source.data, source.dtype, source.row_stride, source.cols,
                                         group,       target.codes, target.scales};
  const detail::Kernels& kernels = detail::active_kernels();
  std::atomic<bool> nonfinite{false};
  for_rows(source.rows, source.cols, detail::quantize_convrot_scratch(source.cols, group), threads,
           [&](std::int64_t begin, std::int64_t end, float* scratch) {
             if (kernels.quantize_convrot(task, begin, end, scratch)) nonfinite = true;
           });
  if (!nonfinite) return;
  if (find_nonfinite(source, threads)) detail::throw_nonfinite(source, threads);
  throw InvalidArgument("the numbers are too large to be rotated in float32");
}

void dequantize_convrot(const ConstInt8View& source, std::int64_t group, const MatrixView& target,
                        int threads) {
  const Ranges memory(target, source, group, "the target");
  detail::check_disjoint(memory.plain, {memory.codes, memory.scales});
  const detail::DequantizeConvrotTask task{source.codes, source.scales, source.cols,      group,
                                           target.data,  target.dtype,  target.row_stride};
  const detail::Kernels& kernels = detail::active_kernels();
  for_rows(source.rows, source.cols, detail::dequantize_convrot_scratch(group), threads,
           [&](std::int64_t begin, std::int64_t end, float* scratch) {
             kernels.dequantize_convrot(task, begin, end, scratch);
           });
}

}  // namespace zimage_mxfp8
