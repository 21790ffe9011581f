// A row of the table of GEMM kernels: a kernel's properties and requirements.
//
// A new kernel is one file, which defines its GemmImplementation, and one line in table.cpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "gemm/task.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8 {

namespace detail {

// The functions that a kernel's own file defines. Problems are of the operands, outputs, epilogues
// and compute capability of its row; sizes are positive, and the device is current.
struct GemmImplementation {
  // Whether the build and its libraries have the kernel; null if they always do.
  Support (*available)();
  // Bytes of workspace; null for none.
  std::size_t (*workspace)(const GemmProblem& problem);
  // Launches the kernel. Arguments are checked and the workspace is large enough.
  void (*run)(const GemmTask& task, Workspace workspace, CudaStream stream);
};

// Sets of operand pairs, outputs and epilogues, as bits.
constexpr std::uint32_t operands(OperandFormat a, OperandFormat b) {
  return 1u << (static_cast<unsigned>(a) * std::size(kOperandFormats) + static_cast<unsigned>(b));
}
constexpr std::uint32_t output(DType dtype) { return 1u << static_cast<unsigned>(dtype); }
constexpr std::uint32_t epilogue(GemmEpilogue kind) { return 1u << static_cast<unsigned>(kind); }

}  // namespace detail

struct GemmKernel {
  const char* name;
  std::uint32_t operands;
  std::uint32_t outputs;
  std::uint32_t epilogues;         // that it fuses; kNone is one of them if it computes plain GEMMs
  std::uint32_t addend_epilogues;  // the same after a low-rank addend; 0 if it adds none
  bool bias;                       // whether it adds one
  // Compute capabilities, such as 90 for 9.0, ended by 0. A negative one means that or newer.
  std::array<int, 10> capabilities;
  bool on_cpu;
  const detail::GemmImplementation* implementation;
  // Estimated duration relative to other kernels for the same problem, see heuristics.h.
  double (*cost)(const GemmProblem& problem, const CudaDevice& device);
};

}  // namespace zimage_mxfp8
