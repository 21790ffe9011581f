// The entry function of narrow.cu: arguments are checked, and there is at least one row.
#pragma once

#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail {

inline constexpr std::int64_t kNarrowRows = 32;  // of which R is a multiple

void narrow_gemm_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                      const float* factors, const MatrixView& d, CudaStream stream);

}  // namespace zimage_mxfp8::detail
