// What the kernels of fused_gemm.cuh have in common as rows of the table.
#pragma once

#include <variant>

#include "gemm/sizes.h"
#include "gemm/task.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

// One function for each epilogue, so that the compiler finds one that is missing.
template <typename... Functions>
struct Overloads : Functions... {
  using Functions::operator()...;
};
template <typename... Functions>
Overloads(Functions...) -> Overloads<Functions...>;

// Calls the function for the epilogue of a task with D, which has the columns that it leaves.
template <typename... Functions>
void run_fused(const char* name, const GemmTask& task, Functions... functions) {
  check_32_bit_sizes(name, task);
  const EpilogueArguments none, &epilogue = task.arguments ? task.arguments->epilogue : none;
  MatrixView d{task.d, task.d_dtype, task.m, task.n, task.d_row_stride};
  if (std::holds_alternative<SiluMultiply>(epilogue)) d.cols = task.n / 2;
  const Overloads run{functions...};
  std::visit([&](const auto& one) { run(one, d); }, epilogue);
}

}  // namespace zimage_mxfp8::detail
