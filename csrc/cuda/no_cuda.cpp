// What a build without CUDA has in place of cuda/runtime.cpp and of the kernels.
#include "cuda/runtime.h"
#include "dequantize/dequantize_cuda.h"
#include "quantize/quantize_cuda.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/staged_quantizer.h"

namespace zimage_mxfp8 {
namespace {

[[noreturn]] void refuse() {
  throw Unsupported("this build has no CUDA kernels: rebuild it with ZM_CUDA=ON");
}

}  // namespace

std::vector<CudaDevice> cuda_devices() { return {}; }

struct StagedQuantizer::Resources {};
StagedQuantizer::StagedQuantizer(int) { refuse(); }
StagedQuantizer::~StagedQuantizer() = default;
void StagedQuantizer::quantize(const ConstMatrixView&, const MXFP8View&) { refuse(); }

namespace detail {

void check_device_memory(std::initializer_list<MemoryRange>) { refuse(); }

DeviceGuard::DeviceGuard(int device) {
  if (device >= 0) refuse();
}
DeviceGuard::~DeviceGuard() = default;

void quantize_cuda(const QuantizeTask&, CudaStream) { refuse(); }
void dequantize_cuda(const DequantizeTask&, CudaStream) { refuse(); }

}  // namespace detail
}  // namespace zimage_mxfp8
