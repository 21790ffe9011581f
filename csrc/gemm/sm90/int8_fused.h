// The entry functions of int8_fused.cu: arguments are checked, and there is at least one row,
// column and element of K. `addend` may be null.
#pragma once

#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

void gemm_int8_sm90(const ConstInt8View& a, const ConstInt8View& b, const LowRankAddend* addend,
                    const MatrixView& target, CudaStream stream);
void gemm_int8_silu_multiply_sm90(const ConstInt8View& a, const ConstInt8View& b,
                                  const LowRankAddend* addend, const MatrixView& target,
                                  CudaStream stream);
void gemm_int8_rotate_heads_sm90(const ConstInt8View& a, const ConstInt8View& b,
                                 const RotateHeads& heads, const LowRankAddend* addend,
                                 const MatrixView& target, CudaStream stream);

}  // namespace zimage_mxfp8::detail
