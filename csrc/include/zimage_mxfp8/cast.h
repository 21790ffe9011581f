// Conversion of plain matrices between BF16, F16 and F32.
#pragma once

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// target = source, rounded to nearest even; overflow gives infinity, NaN stays NaN.
// Throws InvalidArgument if the shapes disagree, a size is negative or a pointer is null.
void cast(const ConstMatrixView& source, const MatrixView& target, int threads = 0);

}  // namespace zimage_mxfp8
