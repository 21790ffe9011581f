// The entry functions of narrow.cu: arguments are checked, and there is at least one row.
#pragma once

#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

inline constexpr std::int64_t kNarrowColumns = 32;  // of D, whose number is a multiple of it

void narrow_gemm_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                      const float* factors, const MatrixView& d, CudaStream stream);
void narrow_gemm_sm90(const ConstInt8View& a, const ConstInt8View& b, const float* factors,
                      const MatrixView& d, CudaStream stream);
void narrow_gemm_sm90(const ConstMatrixView& a, const ConstMatrixView& b, const float* factors,
                      const MatrixView& d, CudaStream stream);

}  // namespace zimage_mxfp8::detail
