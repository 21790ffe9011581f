// Choosing a kernel of a table for a problem, and the reasons against each of the others.
#pragma once

#include <string>
#include <vector>

#include "gemm/dispatch/table.h"

namespace zimage_mxfp8::detail {

// Where a problem is computed: a CUDA device, or the CPU if it is null.
using Where = const CudaDevice*;

std::string problem_text(const GemmProblem& problem);
std::string where_text(Where where);

// The plain GEMM of a problem: without its epilogue, D in BF16.
GemmProblem without_epilogue(const GemmProblem& problem);

// Whether a kernel fuses the epilogue of a problem that it supports.
bool fuses_epilogue(const GemmKernel& kernel, const GemmProblem& problem, Where where);

// supports() of gemm.h.
Support supports_on(const GemmKernel& kernel, const GemmProblem& problem, Where where);

// explain_gemm() of gemm.h. `forced` names a kernel to choose wherever it supports the problem; ""
// for none.
std::vector<GemmCandidate> explain(GemmTable table, const GemmProblem& problem, Where where,
                                   const std::string& forced);

// choose_gemm() of gemm.h.
const GemmKernel& choose(GemmTable table, const GemmProblem& problem, Where where,
                         const std::string& forced);

// A line for a log: the problem, the chosen kernel, and why each of the others was not chosen.
std::string log_line(const GemmProblem& problem, Where where,
                     const std::vector<GemmCandidate>& candidates);

}  // namespace zimage_mxfp8::detail
