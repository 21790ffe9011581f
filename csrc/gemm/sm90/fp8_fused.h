// The entry functions of fp8_fused.cu: arguments are checked, and there is at least one row,
// column and element of K.
#pragma once

#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

void gemm_low_rank_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                        const LowRankAddend& addend, const MatrixView& target, CudaStream stream);
// `addend` may be null.
void gemm_silu_multiply_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                             const LowRankAddend* addend, const MatrixView& target,
                             CudaStream stream);
void gemm_rotate_heads_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                            const RotateHeads& heads, const LowRankAddend* addend,
                            const MatrixView& target, CudaStream stream);

}  // namespace zimage_mxfp8::detail
