#pragma once

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

// Throws NonFiniteValue for the first NaN or infinity of a matrix on the host, which has one.
[[noreturn]] void throw_nonfinite(const ConstMatrixView& matrix, int threads);

}  // namespace zimage_mxfp8::detail
