#pragma once

#include "zimage_mxfp8/attention.h"

namespace zimage_mxfp8::detail {

// Arguments are checked.
void attend_cuda(const ConstMatrixView& qkv, std::int64_t heads,
                 const std::vector<std::int64_t>& lengths, const MatrixView& out,
                 CudaStream stream);

}  // namespace zimage_mxfp8::detail
