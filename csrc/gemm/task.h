// Arguments of GEMM kernels.
#pragma once

#include <stdint.h>

#include "tasks.h"

namespace zimage_mxfp8 {

enum class OperandFormat : uint8_t;
struct GemmArguments;
struct LowRankAddend;

namespace detail {

struct GemmOperandTask {
  OperandFormat format;
  const void* codes;   // or elements
  const void* scales;  // E8M0 in the blocked layout, or one float32 per row; null for elements
  int64_t row_stride;  // elements
  DType dtype;         // of the elements, if they are not encoded
};

// D[m, n] = epilogue(A[m, k] B[n, k]^T + bias[n]), or as many columns as the epilogue leaves.
struct GemmTask {
  int64_t m, n, k;
  GemmOperandTask a, b;
  const void* bias;  // BF16, or null
  void* d;
  DType d_dtype;
  int64_t d_row_stride;
  const GemmArguments* arguments;  // of the call, for the epilogue to fuse; null without one
  const LowRankAddend* addend;     // null without one
};

}  // namespace detail
}  // namespace zimage_mxfp8
