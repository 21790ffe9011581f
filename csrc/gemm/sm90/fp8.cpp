#include <cstdint>
#include <variant>

#include "gemm/dispatch/table.h"
#include "gemm/sm90/fp8_fused.h"
#include "gemm/sm90/fused_run.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {
namespace {

ConstRowScaledView view(const GemmOperandTask& operand, std::int64_t rows, std::int64_t cols) {
  return {static_cast<const std::uint8_t*>(operand.codes),
          static_cast<const float*>(operand.scales), rows, cols};
}

void run(const GemmTask& task, Workspace, CudaStream stream) {
  const ConstRowScaledView a = view(task.a, task.m, task.k), b = view(task.b, task.n, task.k);
  run_fused(
      "fp8_sm90", task,
      [&](std::monostate, const MatrixView& d) {
        if (!task.addend) throw Unsupported("fp8_sm90 needs an epilogue or an addend");
        gemm_low_rank_sm90(a, b, *task.addend, d, stream);
      },
      [&](SiluMultiply, const MatrixView& d) {
        gemm_silu_multiply_sm90(a, b, task.addend, d, stream);
      },
      [&](const RotateHeads& heads, const MatrixView& d) {
        gemm_rotate_heads_sm90(a, b, heads, task.addend, d, stream);
      });
}

}  // namespace

const GemmImplementation kFP8SM90{nullptr, nullptr, run};

}  // namespace zimage_mxfp8::detail
