// The table of epilogues: what each does to D, and its launch where no kernel fuses it.
//
// A new epilogue is a value and a struct in gemm.h and a line in epilogues.cpp; a kernel that fuses
// it names it in its row of dispatch/table.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "check.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

struct EpilogueRow {
  EpilogueInfo info;
  // Checks the arguments and returns the memory that they name, which is only read.
  std::vector<MemoryRange> (*check)(const EpilogueArguments& arguments, const GemmProblem& problem);
  // Launches the epilogue on the sums, BF16 [M, N]. They are in D's own memory if D has that shape
  // and is not encoded. Null for kNone.
  void (*launch)(const MatrixView& sums, const GemmArguments& arguments, CudaStream stream);
};

const EpilogueRow& epilogue_row(GemmEpilogue epilogue);

}  // namespace zimage_mxfp8::detail
