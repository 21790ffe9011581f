#include <cstdint>

#include "gemm/dispatch/table.h"
#include "gemm/sm90/fp8_fused.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

ConstRowScaledView view(const GemmOperandTask& operand, std::int64_t rows, std::int64_t cols) {
  return {static_cast<const std::uint8_t*>(operand.codes),
          static_cast<const float*>(operand.scales), rows, cols};
}

constexpr std::int64_t kMaxSize = std::int64_t{1} << 30;  // the kernel counts elements in 32 bits

void run(const GemmTask& task, Workspace, CudaStream stream) {
  if (task.m >= kMaxSize || task.n >= kMaxSize || task.k >= kMaxSize) {
    throw Unsupported("fp8_sm90 takes sizes below 2^30");
  }
  const ConstRowScaledView a = view(task.a, task.m, task.k), b = view(task.b, task.n, task.k);
  MatrixView d{task.d, task.d_dtype, task.m, task.n, task.d_row_stride};
  if (task.epilogue == GemmEpilogue::kSiluMultiply) {
    d.cols = task.n / 2;
    return gemm_silu_multiply_sm90(a, b, d, stream);
  }
  const RotateHeads& epilogue = *task.rotate_heads;
  gemm_rotate_heads_sm90(a, b, epilogue.q_weight, epilogue.k_weight, epilogue.rotations,
                         epilogue.heads, epilogue.eps, d, stream);
}

}  // namespace

const GemmImplementation kFP8SM90{nullptr, nullptr, run};

}  // namespace zimage_mxfp8::detail
