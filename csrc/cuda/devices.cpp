// Functions for builds with and without CUDA.
#include <string>

#include "cuda/runtime.h"

namespace zimage_mxfp8::detail {

const CudaDevice& find_device(int index) {
  const std::vector<CudaDevice>& devices = known_devices();
  if (build_info().cuda.empty()) throw Unsupported(kNoCuda);
  if (index < 0 || static_cast<std::size_t>(index) >= devices.size()) {
    throw Unsupported("there is no CUDA device " + std::to_string(index) + " (" +
                      std::to_string(devices.size()) + " found)");
  }
  return devices[static_cast<std::size_t>(index)];
}

void check_device_pair(const PairRanges& memory, DType dtype) {
  check_alignment(memory.plain, element_size(dtype));
  check_alignment(memory.codes, 16);
  check_alignment(memory.scales, 16);
  check_device_memory({memory.plain, memory.codes, memory.scales});
}

}  // namespace zimage_mxfp8::detail
