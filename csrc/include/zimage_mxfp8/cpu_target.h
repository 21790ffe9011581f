// The instruction sets that the CPU kernels are compiled for, and which of them runs.
#pragma once

#include <string>
#include <vector>

namespace zimage_mxfp8 {

enum class CpuTarget {
  kBaseline,  // the compiler's default (SSE2 on x86-64, NEON on arm64)
  kAVX2,
  kAVX512,  // F, BW, DQ and VL
};

// "baseline", "avx2" or "avx512".
const char* name(CpuTarget target);

// The targets that are compiled in and that this processor runs, slowest first.
std::vector<CpuTarget> available_cpu_targets();

// The target that operations use: the fastest available one, unless force_cpu_target() or, at
// first use, the environment variable ZIMAGE_MXFP8_CPU named another. Throws Unsupported if the
// variable names something that is not available.
CpuTarget active_cpu_target();

// Forces a target for all later operations of the process. Thread-safe. Throws Unsupported if it
// is not available and InvalidArgument if the name is unknown.
void force_cpu_target(const std::string& target_name);

}  // namespace zimage_mxfp8
