#pragma once

#include "zimage_mxfp8/row_scaled.h"

namespace zimage_mxfp8::detail {

// At least one row. Codes are 16-byte aligned.
void fold_cuda(const ConstMXFP8View& source, const RowScaledView& target, FoldRowStats* stats,
               CudaStream stream);

}  // namespace zimage_mxfp8::detail
