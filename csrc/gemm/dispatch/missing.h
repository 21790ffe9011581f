// The implementation of a kernel that a build does not have.
#pragma once

#include "gemm/dispatch/kernel.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {

// `Reason` has a constant `text`: why, and how to get the kernel.
template <typename Reason>
constexpr GemmImplementation missing_kernel() {
  return {[] { return Support{false, Reason::text}; }, nullptr,
          [](const GemmTask&, Workspace, CudaStream) { throw Unsupported(Reason::text); }};
}

}  // namespace zimage_mxfp8::detail
