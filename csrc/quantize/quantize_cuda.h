#pragma once

#include "tasks.h"
#include "zimage_mxfp8/device.h"

namespace zimage_mxfp8::detail {

// Codes are 8-byte, scales 16-byte aligned. NaN and infinity give blocks of NaN.
void quantize_cuda(const QuantizeTask& task, CudaStream stream);

}  // namespace zimage_mxfp8::detail
