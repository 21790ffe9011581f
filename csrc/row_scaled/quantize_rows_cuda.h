#pragma once

#include "tasks.h"
#include "zimage_mxfp8/device.h"

namespace zimage_mxfp8::detail {

// Codes are 16-byte aligned.
void quantize_rows_cuda(const QuantizeRowsTask& task, CudaStream stream);

}  // namespace zimage_mxfp8::detail
