// Functions for builds with and without CUDA.
#include <cstdlib>
#include <string>

#include "cuda/runtime.h"

namespace zimage_mxfp8 {

int capability_limit() {
  static const int limit = [] {
    const char* const value = std::getenv("ZIMAGE_MXFP8_CAPABILITY");
    const std::string text = value ? value : "";
    if (text.empty()) return 0;
    const auto point = text.find('.');
    const auto is_number = [&](const std::string& part) {
      return !part.empty() && part.size() < 3 &&
             part.find_first_not_of("0123456789") == std::string::npos;
    };
    if (point == std::string::npos || !is_number(text.substr(0, point)) ||
        text.size() != point + 2 || !is_number(text.substr(point + 1)) ||
        text.find_first_not_of("0.") == std::string::npos) {
      throw InvalidArgument("ZIMAGE_MXFP8_CAPABILITY is \"" + text +
                            "\": set it to a compute capability such as 8.0");
    }
    return std::stoi(text.substr(0, point)) * 10 + std::stoi(text.substr(point + 1));
  }();
  return limit;
}

namespace detail {

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

}  // namespace detail
}  // namespace zimage_mxfp8
