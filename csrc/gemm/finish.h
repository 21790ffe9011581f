// The last step of a GEMM, for outputs that the library's GEMM does not write.
#pragma once

#include "gemm/task.h"
#include "zimage_mxfp8/device.h"

namespace zimage_mxfp8::detail {

// D = source + bias, where `source` is [m, n] float32 and may be D itself.
void gemm_finish(const float* source, int64_t source_row_stride, const GemmTask& task,
                 CudaStream stream);

}  // namespace zimage_mxfp8::detail
