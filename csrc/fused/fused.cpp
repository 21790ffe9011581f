#include "zimage_mxfp8/fused.h"

#include <string>
#include <variant>

#include "check.h"
#include "cuda/runtime.h"
#include "fused/fused_cuda.h"
#include "rotated/quantize_rotated_cuda.h"
#include "zimage_mxfp8/rotated.h"

namespace zimage_mxfp8 {
namespace {

using detail::MemoryRange;

// Memory that an activation occupies: elements, or codes and scales.
struct ActivationMemory {
  MemoryRange values, scales;
};

template <typename View>
void check_bfloat16(const View& matrix, const char* what) {
  detail::check_matrix(matrix, what);
  if (matrix.dtype != DType::kBFloat16) {
    throw InvalidArgument(std::string(what) + " must be bfloat16");
  }
}

// Throws InvalidArgument unless a matrix of the call has the size of the first.
void check_size(std::int64_t rows, std::int64_t cols, const char* what, const ConstMatrixView& like,
                const char* like_what) {
  if (rows != like.rows || cols != like.cols) {
    throw InvalidArgument(std::string(what) + " is " + detail::shape_text(rows, cols) + " but " +
                          like_what + " is " + detail::shape_text(like.rows, like.cols));
  }
}

void check_columns(std::int64_t cols) {
  if (cols < 1 || cols > kMaxFusedColumns) {
    throw InvalidArgument("rows must have 1 to " + std::to_string(kMaxFusedColumns) +
                          " columns, not " + std::to_string(cols));
  }
}

void check_eps(float eps) {
  if (!(eps >= 0.0f)) throw InvalidArgument("eps must be 0 or more");
}

ConstMatrixView as_const(const MatrixView& matrix) {
  return {matrix.data, matrix.dtype, matrix.rows, matrix.cols, matrix.row_stride};
}

MemoryRange range_of(const ConstMatrixView& matrix, const char* what) {
  const MemoryRange range = detail::range_of(matrix, what);
  detail::check_alignment(range, element_size(matrix.dtype));
  return range;
}

ActivationMemory check_target(const MatrixView& target, const ConstMatrixView& source,
                              const char* source_what) {
  check_bfloat16(target, "the target");
  check_size(target.rows, target.cols, "the target", source, source_what);
  return {range_of(as_const(target), "the target"), {nullptr, 0, ""}};
}

ActivationMemory check_codes(const void* codes, std::int64_t code_bytes, const void* scales,
                             std::int64_t scale_bytes, std::size_t scale_alignment) {
  if (!codes || !scales) throw InvalidArgument("codes or scales are a null pointer");
  const ActivationMemory memory{{codes, code_bytes, "codes"}, {scales, scale_bytes, "scales"}};
  detail::check_alignment(memory.values, 16);
  detail::check_alignment(memory.scales, scale_alignment);
  return memory;
}

ActivationMemory check_target(const MXFP8View& target, const ConstMatrixView& source,
                              const char* source_what) {
  check_size(target.rows, target.cols, "the target", source, source_what);
  const MXFP8Shape shape{target.rows, target.cols};
  return check_codes(target.codes, shape.code_bytes(), target.scales, shape.scale_bytes(), 16);
}

ActivationMemory check_target(const RowScaledView& target, const ConstMatrixView& source,
                              const char* source_what) {
  check_size(target.rows, target.cols, "the target", source, source_what);
  return check_codes(target.codes, target.rows * target.cols, target.scales,
                     target.rows * static_cast<std::int64_t>(sizeof(float)), sizeof(float));
}

ActivationMemory check_target(const Int8View& target, const ConstMatrixView& source,
                              const char* source_what) {
  check_size(target.rows, target.cols, "the target", source, source_what);
  if (target.cols % kRotationColumns != 0) {
    throw InvalidArgument("INT8 needs a multiple of " + std::to_string(kRotationColumns) +
                          " columns, not " + std::to_string(target.cols));
  }
  return check_codes(target.codes, target.rows * target.cols, target.scales,
                     target.rows * static_cast<std::int64_t>(sizeof(float)), sizeof(float));
}

ActivationMemory check_activation(const ActivationView& target, const ConstMatrixView& source,
                                  const char* source_what) {
  return std::visit([&](const auto& view) { return check_target(view, source, source_what); },
                    target);
}

// Checks the memory of an operation that reads two matrices and writes an activation of the size
// of `like`.
void check_memory(const ConstMatrixView& first, const char* first_what,
                  const ConstMatrixView& second, const char* second_what,
                  const ActivationView& target, const ConstMatrixView& like,
                  const char* like_what) {
  const MemoryRange from_first = range_of(first, first_what),
                    from_second = range_of(second, second_what);
  const ActivationMemory to = check_activation(target, like, like_what);
  detail::check_disjoint(to.values, {to.scales, from_first, from_second});
  detail::check_disjoint(to.scales, {from_first, from_second});
  detail::check_device_memory({from_first, from_second, to.values, to.scales});
}

// Memory of a norm's weight and modulation; the latter is empty without a modulation.
struct NormMemory {
  MemoryRange weight, modulation;
};

NormMemory check_norm(const NormWeights& norm, std::int64_t cols, Items items, const char* weight,
                      const char* modulation) {
  NormMemory memory{detail::required_range(norm.weight, cols * 2, 2, weight),
                    {nullptr, 0, modulation}};
  if (!norm.modulation) return memory;
  const ConstMatrixView& rows = *norm.modulation;
  check_bfloat16(rows, modulation);
  if (rows.cols != cols) {
    throw InvalidArgument(std::string(modulation) + " has " + std::to_string(rows.cols) +
                          " columns, not " + std::to_string(cols));
  }
  if (rows.rows < 1 || (!items && rows.rows != 1)) {
    throw InvalidArgument(std::string(modulation) + " must have " +
                          (items ? "one row or more" : "one row where there are no items") +
                          ", not " + std::to_string(rows.rows));
  }
  memory.modulation = range_of(rows, modulation);
  return memory;
}

MemoryRange check_items(Items items, std::int64_t rows) {
  if (!items) return {nullptr, 0, "items"};
  return detail::required_range(items, rows * static_cast<std::int64_t>(sizeof(*items)),
                                sizeof(*items), "items");
}

}  // namespace

void quantize_rotated(const ConstMatrixView& source, const Int8View& target, CudaStream stream) {
  check_bfloat16(source, "the source");
  check_columns(source.cols);
  const MemoryRange from = range_of(source, "the source");
  if (source.rows == 0) return;
  const ActivationMemory to = check_target(target, source, "the source");
  detail::check_disjoint(to.values, {to.scales, from});
  detail::check_disjoint(to.scales, {from});
  detail::check_device_memory({from, to.values, to.scales});
  detail::quantize_rotated_cuda(source, target, stream);
}

void join_columns(const ConstMatrixView& left, const ConstMatrixView& right,
                  const ActivationView& target, CudaStream stream) {
  check_bfloat16(left, "left");
  check_bfloat16(right, "right");
  if (right.rows != left.rows) {
    throw InvalidArgument("right has " + std::to_string(right.rows) + " rows but left has " +
                          std::to_string(left.rows));
  }
  const ConstMatrixView joined{nullptr, DType::kBFloat16, left.rows, left.cols + right.cols, 0};
  check_columns(joined.cols);
  if (left.rows == 0) return;
  check_memory(left, "left", right, "right", target, joined, "the joined matrix");
  detail::join_columns_cuda(left, right, target, stream);
}

void silu_multiply(const ConstMatrixView& gate, const ConstMatrixView& up,
                   const ActivationView& target, CudaStream stream) {
  check_bfloat16(gate, "gate");
  check_bfloat16(up, "up");
  check_size(up.rows, up.cols, "up", gate, "gate");
  check_columns(gate.cols);
  if (gate.rows == 0) return;
  check_memory(gate, "gate", up, "up", target, gate, "gate");
  detail::silu_multiply_cuda(gate, up, target, stream);
}

void norm_modulate(const ConstMatrixView& x, const NormWeights& norm, Items items, float eps,
                   const ActivationView& target, CudaStream stream) {
  check_bfloat16(x, "x");
  check_columns(x.cols);
  check_eps(eps);
  const NormMemory from_norm = check_norm(norm, x.cols, items, "weight", "scale");
  if (x.rows == 0) return;
  const MemoryRange from = range_of(x, "x"), from_items = check_items(items, x.rows);
  const ActivationMemory to = check_activation(target, x, "x");
  for (const MemoryRange& written : {to.values, to.scales}) {
    detail::check_disjoint(written, {from, from_norm.weight, from_norm.modulation, from_items});
  }
  detail::check_disjoint(to.values, {to.scales});
  detail::check_device_memory(
      {from, from_norm.weight, from_norm.modulation, from_items, to.values, to.scales});
  detail::norm_modulate_cuda(x, norm, items, eps, target, stream);
}

void add_norm_modulate(const MatrixView& x, const ConstMatrixView& y, const NormWeights& norm,
                       const std::optional<ScaledMatrix>& addend,
                       const std::optional<NextNorm>& next, Items items, float eps,
                       CudaStream stream) {
  check_bfloat16(x, "x");
  check_bfloat16(y, "y");
  check_size(y.rows, y.cols, "y", as_const(x), "x");
  check_columns(x.cols);
  check_eps(eps);
  const NormMemory from_norm = check_norm(norm, x.cols, items, "norm_weight", "gate");
  MemoryRange from_addend{nullptr, 0, ""}, from_factor = from_addend;
  if (addend) {
    check_bfloat16(addend->matrix, "addend");
    check_size(addend->matrix.rows, addend->matrix.cols, "addend", as_const(x), "x");
    from_addend = range_of(addend->matrix, "addend");
    from_factor =
        detail::required_range(addend->factor, sizeof(float), sizeof(float), "addend_factor");
  }
  NormMemory from_next{{nullptr, 0, ""}, {nullptr, 0, ""}};
  if (next) from_next = check_norm(next->norm, x.cols, items, "next_weight", "next_scale");
  if (x.rows == 0) return;
  const MemoryRange in_place = range_of(as_const(x), "x"), from = range_of(y, "y");
  const MemoryRange from_items = check_items(items, x.rows);
  ActivationMemory to{{nullptr, 0, ""}, {nullptr, 0, ""}};
  if (next) to = check_activation(next->target, as_const(x), "x");
  for (const MemoryRange& written : {to.values, to.scales, in_place}) {
    detail::check_disjoint(written, {from, from_norm.weight, from_norm.modulation, from_next.weight,
                                     from_next.modulation, from_items, from_addend, from_factor});
  }
  detail::check_disjoint(to.values, {to.scales, in_place});
  detail::check_disjoint(to.scales, {in_place});
  detail::check_device_memory({in_place, from, from_norm.weight, from_norm.modulation,
                               from_next.weight, from_next.modulation, from_items, from_addend,
                               from_factor, to.values, to.scales});
  detail::add_norm_modulate_cuda(x, y, norm, addend, next, items, eps, stream);
}

void rotate_heads(const MatrixView& matrix, const void* q_weight, const void* k_weight,
                  const ConstMatrixView& rotations, std::int64_t q_heads, std::int64_t k_heads,
                  float eps, CudaStream stream) {
  check_bfloat16(matrix, "the matrix");
  detail::check_matrix(rotations, "rotations");
  if (rotations.dtype != DType::kFloat32) throw InvalidArgument("rotations must be float32");
  check_eps(eps);
  detail::check_heads(matrix.cols, "the matrix's columns", q_heads, k_heads);
  if (rotations.rows != matrix.rows || rotations.cols != kHeadSize) {
    throw InvalidArgument("rotations must be " + detail::shape_text(matrix.rows, kHeadSize) +
                          ", not " + detail::shape_text(rotations.rows, rotations.cols));
  }
  const MemoryRange from_q = detail::required_range(q_weight, kHeadSize * 2, 2, "q_weight");
  const MemoryRange from_k = detail::required_range(k_weight, kHeadSize * 2, 2, "k_weight");
  if (matrix.rows == 0) return;
  const MemoryRange in_place = range_of(as_const(matrix), "the matrix");
  const MemoryRange from = range_of(rotations, "rotations");
  detail::check_disjoint(in_place, {from_q, from_k, from});
  detail::check_device_memory({in_place, from_q, from_k, from});
  detail::rotate_heads_cuda(matrix, q_weight, k_weight, rotations, q_heads, k_heads, eps, stream);
}

void detail::check_heads(std::int64_t width, const char* what, std::int64_t q_heads,
                         std::int64_t k_heads) {
  const std::int64_t heads = width / kHeadSize;
  if (width % kHeadSize == 0 && q_heads >= 0 && k_heads >= 0 && q_heads <= heads &&
      k_heads <= heads - q_heads) {
    return;
  }
  throw InvalidArgument(std::string(what) + " are " + std::to_string(width) +
                        ", which cannot begin with " + std::to_string(q_heads) +
                        " heads of q and " + std::to_string(k_heads) + " of k, of " +
                        std::to_string(kHeadSize) + " each");
}

}  // namespace zimage_mxfp8
