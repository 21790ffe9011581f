#pragma once

#include "tasks.h"
#include "zimage_mxfp8/device.h"

namespace zimage_mxfp8::detail {

// Codes are 8-byte, scales 16-byte aligned.
void dequantize_cuda(const DequantizeTask& task, CudaStream stream);

}  // namespace zimage_mxfp8::detail
