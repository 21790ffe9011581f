#include <cstdint>
#include <variant>

#include "gemm/dispatch/table.h"
#include "gemm/sm90/fused_run.h"
#include "gemm/sm90/int8_fused.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {
namespace {

ConstInt8View view(const GemmOperandTask& operand, std::int64_t rows, std::int64_t cols) {
  return {static_cast<const std::int8_t*>(operand.codes), static_cast<const float*>(operand.scales),
          rows, cols};
}

void run(const GemmTask& task, Workspace, CudaStream stream) {
  const ConstInt8View a = view(task.a, task.m, task.k), b = view(task.b, task.n, task.k);
  run_fused(
      "int8_sm90", task,
      [&](std::monostate, const MatrixView& d) { gemm_int8_sm90(a, b, task.addend, d, stream); },
      [&](SiluMultiply, const MatrixView& d) {
        gemm_int8_silu_multiply_sm90(a, b, task.addend, d, stream);
      },
      [&](const RotateHeads& heads, const MatrixView& d) {
        gemm_int8_rotate_heads_sm90(a, b, heads, task.addend, d, stream);
      });
}

}  // namespace

const GemmImplementation kInt8SM90{nullptr, nullptr, run};

}  // namespace zimage_mxfp8::detail
