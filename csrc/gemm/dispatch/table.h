// The table of GEMM kernels.
#pragma once

#include "gemm/dispatch/kernel.h"

namespace zimage_mxfp8::detail {

struct GemmTable {
  const GemmKernel* begin_;
  const GemmKernel* end_;
  const GemmKernel* begin() const { return begin_; }
  const GemmKernel* end() const { return end_; }
};

// All kernels, in every build; `available` of an implementation says if the build lacks it.
GemmTable gemm_table();

// Implementations that the kernels' files define, or `missing_*.cpp` in builds without them.
extern const GemmImplementation kReference, kDequantize, kFP8Rowwise, kMixedSM90, kFP8SM90,
    kMXFP8SM100, kMXFP8SM120, kInt8SM90, kInt8SM80;

}  // namespace zimage_mxfp8::detail
