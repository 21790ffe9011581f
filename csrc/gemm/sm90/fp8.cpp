#include <cstdint>
#include <variant>

#include "gemm/dispatch/table.h"
#include "gemm/sm90/fp8_fused.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {
namespace {

ConstRowScaledView view(const GemmOperandTask& operand, std::int64_t rows, std::int64_t cols) {
  return {static_cast<const std::uint8_t*>(operand.codes),
          static_cast<const float*>(operand.scales), rows, cols};
}

constexpr std::int64_t kMaxSize = std::int64_t{1} << 30;  // the kernel counts elements in 32 bits

// One function for each epilogue, so that the compiler finds one that is missing.
template <typename... Functions>
struct Overloads : Functions... {
  using Functions::operator()...;
};
template <typename... Functions>
Overloads(Functions...) -> Overloads<Functions...>;

void run(const GemmTask& task, Workspace, CudaStream stream) {
  if (task.m >= kMaxSize || task.n >= kMaxSize || task.k >= kMaxSize) {
    throw Unsupported("fp8_sm90 takes sizes below 2^30");
  }
  const ConstRowScaledView a = view(task.a, task.m, task.k), b = view(task.b, task.n, task.k);
  MatrixView d{task.d, task.d_dtype, task.m, task.n, task.d_row_stride};
  const Overloads launch{
      [&](const std::monostate&) {
        if (!task.addend) throw Unsupported("fp8_sm90 needs an epilogue or an addend");
        gemm_low_rank_sm90(a, b, *task.addend, d, stream);
      },
      [&](const SiluMultiply&) {
        d.cols = task.n / 2;
        gemm_silu_multiply_sm90(a, b, task.addend, d, stream);
      },
      [&](const RotateHeads& epilogue) {
        gemm_rotate_heads_sm90(a, b, epilogue.q_weight, epilogue.k_weight, epilogue.rotations,
                               epilogue.heads, epilogue.eps, task.addend, d, stream);
      },
  };
  std::visit(launch, task.arguments ? task.arguments->epilogue : EpilogueArguments{});
}

}  // namespace

const GemmImplementation kFP8SM90{nullptr, nullptr, run};

}  // namespace zimage_mxfp8::detail
