// The reference kernel on the CPU.
#pragma once

#include "gemm/task.h"

namespace zimage_mxfp8::detail {

// Computes a GEMM without an epilogue and an addend in host memory, on `threads` threads (0: one
// per core). More than gemm() takes: operands that are not encoded may have any dtype, M, N and K
// any size, and rows any stride. The codes of MXFP8 rows are padded to whole blocks.
void reference_gemm(const GemmTask& task, int threads);

}  // namespace zimage_mxfp8::detail
