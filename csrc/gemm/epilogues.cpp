#include "gemm/epilogues.h"

#include <iterator>
#include <variant>

#include "fused/fused_cuda.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8 {
namespace detail {
namespace {

std::vector<MemoryRange> no_memory(const EpilogueArguments&, const GemmProblem&) { return {}; }

void launch_silu_multiply(const MatrixView& sums, const GemmArguments& arguments,
                          CudaStream stream) {
  const std::int64_t columns = sums.cols / 2;
  const ConstMatrixView gate{sums.data, sums.dtype, sums.rows, columns, sums.row_stride};
  ConstMatrixView up = gate;
  up.data = static_cast<const std::uint16_t*>(sums.data) + columns;
  silu_multiply(gate, up, arguments.d, stream);
}

std::vector<MemoryRange> check_rotate_heads(const EpilogueArguments& arguments,
                                            const GemmProblem& problem) {
  const RotateHeads& epilogue = std::get<RotateHeads>(arguments);
  check_heads(problem.n, "B's rows", epilogue.q_heads, epilogue.k_heads);
  if (!(epilogue.eps >= 0.0f)) throw InvalidArgument("eps must be 0 or more");
  const ConstMatrixView& rotations = epilogue.rotations;
  check_matrix(rotations, "rotations");
  if (rotations.dtype != DType::kFloat32 || rotations.rows != problem.m ||
      rotations.cols != kHeadSize) {
    throw InvalidArgument("rotations must be float32 " + shape_text(problem.m, kHeadSize));
  }
  const std::vector<MemoryRange> memory{
      required_range(epilogue.q_weight, kHeadSize * 2, 16, "q_weight"),
      required_range(epilogue.k_weight, kHeadSize * 2, 16, "k_weight"),
      range_of(rotations, "rotations")};
  check_rows(memory.back(), rotations.row_stride, sizeof(float));
  return memory;
}

void launch_rotate_heads(const MatrixView& sums, const GemmArguments& arguments,
                         CudaStream stream) {
  const RotateHeads& epilogue = std::get<RotateHeads>(arguments.epilogue);
  rotate_heads(sums, epilogue.q_weight, epilogue.k_weight, epilogue.rotations, epilogue.q_heads,
               epilogue.k_heads, epilogue.eps, stream);
}

// In the order of GemmEpilogue.
constexpr EpilogueRow kTable[] = {
    {{"none", 1, false}, no_memory, nullptr},
    {{"silu_multiply", 2, true}, no_memory, launch_silu_multiply},
    {{"rotate_heads", 1, false}, check_rotate_heads, launch_rotate_heads},
};
static_assert(std::size(kTable) == std::variant_size_v<EpilogueArguments>);

}  // namespace

const EpilogueRow& epilogue_row(GemmEpilogue epilogue) {
  return kTable[static_cast<std::size_t>(epilogue)];
}

}  // namespace detail

std::vector<GemmEpilogue> gemm_epilogues() {
  std::vector<GemmEpilogue> all;
  for (std::size_t i = 0; i < std::size(detail::kTable); ++i) {
    all.push_back(static_cast<GemmEpilogue>(i));
  }
  return all;
}

const EpilogueInfo& info(GemmEpilogue epilogue) { return detail::epilogue_row(epilogue).info; }

GemmEpilogue find_gemm_epilogue(const std::string& name) {
  for (const GemmEpilogue epilogue : gemm_epilogues()) {
    if (name == info(epilogue).name) return epilogue;
  }
  throw InvalidArgument("unknown epilogue \"" + name + "\"");
}

}  // namespace zimage_mxfp8
