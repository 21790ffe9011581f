// A limit that GEMM kernels share.
#pragma once

#include <cstdint>
#include <string>

#include "gemm/task.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {

// Throws Unsupported for a task of a kernel that counts rows and columns in 32 bits.
inline void check_32_bit_sizes(const char* kernel, const GemmTask& task) {
  constexpr std::int64_t most = std::int64_t{1} << 30;
  if (task.m >= most || task.n >= most || task.k >= most) {
    throw Unsupported(std::string(kernel) + " takes sizes below 2^30");
  }
}

}  // namespace zimage_mxfp8::detail
