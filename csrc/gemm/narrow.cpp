#include "gemm/sm90/narrow.h"

#include <string>
#include <variant>

#include "check.h"
#include "cuda/runtime.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8 {
namespace {

using detail::MemoryRange;

constexpr std::int64_t kMaxSize = std::int64_t{1} << 30;

// What is checked of an operand.
struct Operand {
  std::int64_t rows, cols, row_stride, item;
  MemoryRange elements, scales;  // no scales of BF16
};

template <class View>
void check_size(const View& view, const char* name) {
  if (view.rows < 0 || view.cols < 0 || view.rows >= kMaxSize || view.cols >= kMaxSize) {
    throw InvalidArgument(std::string(name) + " is " + detail::shape_text(view.rows, view.cols) +
                          ": both sizes must be from 0 to below 2^30");
  }
}

Operand operand(const ConstMatrixView& view, const char* name) {
  check_size(view, name);
  detail::check_matrix(view, name);
  if (view.dtype != DType::kBFloat16) throw InvalidArgument(std::string(name) + " must be BF16");
  return {view.rows,
          view.cols,
          view.rows > 1 ? view.row_stride : view.cols,
          2,
          detail::range_of(view, name),
          {nullptr, 0, name}};
}

template <typename View>  // with codes and scales of rows
Operand operand(const View& view, const char* name) {
  check_size(view, name);
  return {view.rows,
          view.cols,
          view.cols,
          1,
          {view.codes, view.rows * view.cols, name},
          detail::required_range(view.scales, view.rows * 4, 16, "the scales")};
}

void check(const Operand& a, const Operand& b, std::int64_t terms, const float* factors,
           const MatrixView& d) {
  if (a.cols < 1 || a.cols % kBlockSize != 0) {
    throw InvalidArgument("A is " + detail::shape_text(a.rows, a.cols) +
                          ": its width must be a multiple of 32");
  }
  const std::int64_t multiple = terms * detail::kNarrowColumns;
  if (b.cols != a.cols || b.rows < 1 || b.rows % multiple != 0) {
    throw InvalidArgument("B is " + detail::shape_text(b.rows, b.cols) + ": it must have " +
                          std::to_string(a.cols) + " columns and a multiple of " +
                          std::to_string(multiple) + " rows");
  }
  detail::check_matrix(d, "D");
  const std::int64_t columns = b.rows / terms;
  if (d.dtype != DType::kBFloat16 || d.rows != a.rows || d.cols != columns) {
    throw InvalidArgument("D must be BF16 " + detail::shape_text(a.rows, columns));
  }
  const MemoryRange target = detail::range_of(d, "D"),
                    of_columns = detail::required_range(factors, columns * 4, 16, "the factors");
  detail::check_rows(a.elements, a.row_stride, a.item);
  detail::check_rows(b.elements, b.row_stride, b.item);
  detail::check_rows(target, d.rows > 1 ? d.row_stride : d.cols, 2);
  detail::check_disjoint(target, {a.elements, b.elements, b.scales, of_columns});
  detail::check_device_memory({a.elements, b.elements, b.scales, of_columns, target});
  const CudaDevice& device = detail::find_device(detail::current_device());
  if (device.major != 9 || device.minor != 0) {
    throw Unsupported("narrow GEMMs need compute capability 9.0, and this is " + device.name);
  }
}

}  // namespace

void narrow_gemm(const GemmOperand& a, const GemmOperand& b, const float* factors,
                 const MatrixView& d, CudaStream stream) {
  const auto run = [&](const auto& first, const auto& second, std::int64_t terms) {
    check(operand(first, "A"), operand(second, "B"), terms, factors, d);
    if (first.rows > 0) detail::narrow_gemm_sm90(first, second, factors, d, stream);
  };
  const auto* const plain_a = std::get_if<ConstMatrixView>(&a);
  const auto* const plain_b = std::get_if<ConstMatrixView>(&b);
  if (plain_a && plain_b) return run(*plain_a, *plain_b, 1);
  const auto* const scaled_a = std::get_if<ConstRowScaledView>(&a);
  const auto* const scaled_b = std::get_if<ConstRowScaledView>(&b);
  if (scaled_a && scaled_b) return run(*scaled_a, *scaled_b, 2);
  const auto* const int8_a = std::get_if<ConstInt8View>(&a);
  const auto* const int8_b = std::get_if<ConstInt8View>(&b);
  if (int8_a && int8_b) {
    if (int8_a->cols > kMaxInt8Depth) {
      throw InvalidArgument("A of INT8 must have at most " + std::to_string(kMaxInt8Depth) +
                            " columns");
    }
    return run(*int8_a, *int8_b, 2);
  }
  throw InvalidArgument("A and B of a narrow GEMM must both be BF16, row-scaled FP8 or INT8");
}

}  // namespace zimage_mxfp8
