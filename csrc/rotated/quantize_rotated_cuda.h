#pragma once

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

// Arguments are checked, and there is at least one row.
void quantize_rotated_cuda(const ConstMatrixView& source, const Int8View& target,
                           CudaStream stream);

}  // namespace zimage_mxfp8::detail
