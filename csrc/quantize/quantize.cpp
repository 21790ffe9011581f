#include "zimage_mxfp8/quantize.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"
#include "quantize/nonfinite.h"
#include "quantize/quantize_cuda.h"

namespace zimage_mxfp8 {
namespace {

detail::QuantizeTask make_task(const ConstMatrixView& source, const MXFP8View& target) {
  return {source.data, source.dtype, source.row_stride, source.rows,
          source.cols, target.codes, target.scales};
}

}  // namespace

void quantize(const ConstMatrixView& source, const MXFP8View& target, CudaStream stream) {
  detail::check_device_pair(detail::check_encoding(source, target), source.dtype);
  detail::quantize_cuda(make_task(source, target), stream);
}

void quantize(const ConstMatrixView& source, const MXFP8View& target, int threads) {
  detail::check_encoding(source, target);
  const detail::QuantizeTask task = make_task(source, target);
  const MXFP8Shape shape{source.rows, source.cols};
  const detail::Kernels& kernels = detail::active_kernels();
  std::atomic<bool> nonfinite{false};
  const std::int64_t tile = 128;
  detail::parallel_for(
      ceil_div(shape.code_rows(), tile), detail::row_grain(source.cols * tile), threads,
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          if (kernels.quantize_tile(task, i * tile, std::min((i + 1) * tile, shape.code_rows()))) {
            nonfinite = true;
          }
        }
      });
  if (nonfinite) detail::throw_nonfinite(source, threads);
}

namespace detail {

void throw_nonfinite(const ConstMatrixView& matrix, int threads) {
  const Position at = *find_nonfinite(matrix, threads);
  throw NonFiniteValue(
      "NaN or infinity at row " + std::to_string(at.row) + ", column " + std::to_string(at.column),
      at.row, at.column);
}

}  // namespace detail

std::optional<Position> find_nonfinite(const ConstMatrixView& matrix, int threads) {
  detail::check_matrix(matrix, "the matrix");
  const detail::Kernels& kernels = detail::active_kernels();
  const std::size_t size = element_size(matrix.dtype);
  const auto row_data = [&](std::int64_t row) {
    return static_cast<const char*>(matrix.data) +
           row * matrix.row_stride * static_cast<std::int64_t>(size);
  };
  const std::int64_t none = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> first{none};
  detail::parallel_for(matrix.rows, detail::row_grain(matrix.cols), threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t row = begin; row < end; ++row) {
                           if (row >= first) return;
                           if (kernels.row_is_finite(row_data(row), matrix.dtype, matrix.cols)) {
                             continue;
                           }
                           std::int64_t known = first;
                           while (row < known && !first.compare_exchange_weak(known, row)) {
                           }
                           return;
                         }
                       });
  if (first == none) return std::nullopt;
  std::int64_t column = 0;
  while (kernels.row_is_finite(row_data(first) + column * static_cast<std::int64_t>(size),
                               matrix.dtype, 1)) {
    ++column;
  }
  return Position{first, column};
}

}  // namespace zimage_mxfp8
