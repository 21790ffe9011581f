#include "zimage_mxfp8/fused_gemm.h"

#include <limits>
#include <string>

#include "check.h"
#include "cuda/runtime.h"
#include "fused_gemm/fused_gemm_cuda.h"
#include "gemm/gemm_cuda.h"
#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8 {
namespace {

using detail::MemoryRange;

struct OperandMemory {
  MemoryRange codes, scales;
};

OperandMemory check_operand(const ConstRowScaledView& operand, const char* what, const char* codes,
                            const char* scales) {
  const std::int64_t most = std::numeric_limits<std::int32_t>::max() / 2;
  if (operand.rows < 0 || operand.cols < 0 || operand.rows > most || operand.cols > most) {
    throw InvalidArgument("the sizes of " + std::string(what) + " must be from 0 to 2^30 - 1");
  }
  if (operand.rows > 0 && operand.cols > 0 && (!operand.codes || !operand.scales)) {
    throw InvalidArgument("the codes or scales of " + std::string(what) + " are a null pointer");
  }
  const OperandMemory memory{
      {operand.codes, operand.rows * operand.cols, codes},
      {operand.scales, operand.rows * static_cast<std::int64_t>(sizeof(float)), scales}};
  detail::check_alignment(memory.codes, 16);
  detail::check_alignment(memory.scales, 16);
  return memory;
}

OperandMemory check_a(const ConstRowScaledView& a) {
  return check_operand(a, "A", "codes of A", "scales of A");
}
OperandMemory check_b(const ConstRowScaledView& b) {
  return check_operand(b, "B", "codes of B", "scales of B");
}

MemoryRange check_target(const MatrixView& target, std::int64_t rows, std::int64_t cols) {
  detail::check_matrix(target, "the target");
  if (target.dtype != DType::kBFloat16) throw InvalidArgument("the target must be bfloat16");
  if (target.rows != rows || target.cols != cols) {
    throw InvalidArgument("the target is " + detail::shape_text(target.rows, target.cols) +
                          ", and the result is " + detail::shape_text(rows, cols));
  }
  if (cols % 8 != 0 || (rows > 1 && target.row_stride % 8 != 0)) {
    throw InvalidArgument("the rows of the target must be multiples of 16 bytes");
  }
  const MemoryRange memory = detail::range_of(target, "the target");
  detail::check_alignment(memory, 16);
  return memory;
}

void check_depth(const ConstRowScaledView& a, const ConstRowScaledView& b) {
  if (a.cols != b.cols) {
    throw InvalidArgument("A is " + detail::shape_text(a.rows, a.cols) + " and B is " +
                          detail::shape_text(b.rows, b.cols) + ": their widths differ");
  }
  if (a.cols == 0 || a.cols % 16 != 0) {
    throw InvalidArgument("K must be a multiple of 16 and not 0, but is " + std::to_string(a.cols));
  }
}

// Throws Unsupported unless the current device has these operations.
void require_support() {
  const Support support = supports_fused_gemm(detail::current_device());
  if (!support) throw Unsupported(support.reason);
}

}  // namespace

Support supports_fused_gemm(int device) {
  if (device == kHost) return {false, "products with fused epilogues need a CUDA device"};
  const CudaDevice& found = detail::find_device(device);
  if (found.major != 9 || found.minor != 0) {
    return {false,
            "products with fused epilogues need compute capability 9.0, and this is " + found.name};
  }
  return detail::supports_sm90();
}

bool prefers_fused_gemm(std::int64_t m, std::int64_t n, int device) {
  // On an H100 they were faster at 0.91 and more, and slower at 0.78 (docs/performance.md).
  return m > 0 && n > 0 && supports_fused_gemm(device) &&
         detail::utilization_sm90(m, n, device) >= 0.85;
}

void gemm_silu_multiply(const ConstRowScaledView& a, const ConstRowScaledView& b,
                        const MatrixView& target, CudaStream stream) {
  const OperandMemory from_a = check_a(a), from_b = check_b(b);
  check_depth(a, b);
  if (b.rows % 2 != 0) {
    throw InvalidArgument("B must have an even number of rows, not " + std::to_string(b.rows));
  }
  const MemoryRange to = check_target(target, a.rows, b.rows / 2);
  detail::check_disjoint(to, {from_a.codes, from_a.scales, from_b.codes, from_b.scales});
  if (to.bytes == 0) return;
  detail::check_device_memory({from_a.codes, from_a.scales, from_b.codes, from_b.scales, to});
  require_support();
  detail::gemm_silu_multiply_sm90(a, b, target, stream);
}

void gemm_rotate_heads(const ConstRowScaledView& a, const ConstRowScaledView& b,
                       const void* q_weight, const void* k_weight, const ConstMatrixView& rotations,
                       std::int64_t heads, float eps, const MatrixView& target, CudaStream stream) {
  const OperandMemory from_a = check_a(a), from_b = check_b(b);
  check_depth(a, b);
  if (heads < 1) throw InvalidArgument("heads must be 1 or more, not " + std::to_string(heads));
  if (heads > (std::int64_t{1} << 20) || b.rows != 3 * heads * kHeadSize) {
    throw InvalidArgument("B has " + std::to_string(b.rows) + " rows, which is not 3 * " +
                          std::to_string(heads) + " heads of " + std::to_string(kHeadSize));
  }
  if (!(eps >= 0.0f)) throw InvalidArgument("eps must be 0 or more");
  detail::check_matrix(rotations, "rotations");
  if (rotations.dtype != DType::kFloat32 || rotations.rows != a.rows ||
      rotations.cols != kHeadSize) {
    throw InvalidArgument("rotations must be float32 " + detail::shape_text(a.rows, kHeadSize));
  }
  if (rotations.rows > 1 && rotations.row_stride % 4 != 0) {
    throw InvalidArgument("the rows of rotations must be multiples of 16 bytes");
  }
  const MemoryRange from_q = detail::required_range(q_weight, kHeadSize * 2, 16, "q_weight");
  const MemoryRange from_k = detail::required_range(k_weight, kHeadSize * 2, 16, "k_weight");
  const MemoryRange to = check_target(target, a.rows, b.rows);
  if (to.bytes == 0) return;
  const MemoryRange from = detail::range_of(rotations, "rotations");
  detail::check_alignment(from, 16);
  detail::check_disjoint(
      to, {from_a.codes, from_a.scales, from_b.codes, from_b.scales, from_q, from_k, from});
  detail::check_device_memory(
      {from_a.codes, from_a.scales, from_b.codes, from_b.scales, from_q, from_k, from, to});
  require_support();
  detail::gemm_rotate_heads_sm90(a, b, q_weight, k_weight, rotations, heads, eps, target, stream);
}

}  // namespace zimage_mxfp8
