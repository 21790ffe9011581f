#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace zimage_mxfp8 {
namespace {

std::vector<CudaDevice> look_up_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device is an answer, not a failure
    return {};
  }
  std::vector<CudaDevice> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    ZM_CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
    int capability = properties.major * 10 + properties.minor;
    if (capability_limit() > 0) capability = std::min(capability, capability_limit());
    devices.push_back({i, properties.name, capability / 10, capability % 10,
                       properties.multiProcessorCount, properties.totalGlobalMem});
  }
  return devices;
}

}  // namespace

std::vector<CudaDevice> cuda_devices() { return detail::known_devices(); }

namespace detail {

const std::vector<CudaDevice>& known_devices() {
  static const std::vector<CudaDevice> devices = look_up_devices();
  return devices;
}

int multiprocessors(int device) { return find_device(device).multiprocessors; }

void throw_cuda_error(int code, const char* expression, const char* file, int line) {
  const auto status = static_cast<cudaError_t>(code);
  cudaGetLastError();  // reported here, so that a later call does not find it
  throw CudaError(std::string("CUDA: ") + cudaGetErrorString(status) + " (" +
                  cudaGetErrorName(status) + " from " + expression + ", " + file + ":" +
                  std::to_string(line) + ")");
}

int current_device() {
  int device = 0;
  ZM_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

void check_device_memory(std::initializer_list<MemoryRange> ranges) {
  const int device = current_device();
  for (const MemoryRange& range : ranges) {
    if (range.bytes == 0) continue;
    cudaPointerAttributes attributes{};
    ZM_CUDA_CHECK(cudaPointerGetAttributes(&attributes, range.begin));
    const bool on_device =
        attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
    if (!on_device) {
      throw InvalidArgument(std::string(range.what) + " is not in the memory of a CUDA device");
    }
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != device) {
      throw InvalidArgument(std::string(range.what) + " is on CUDA device " +
                            std::to_string(attributes.device) + ", but the current device is " +
                            std::to_string(device));
    }
  }
}

DeviceGuard::DeviceGuard(int device) {
  if (device < 0) return;
  const int current = current_device();
  if (current == device) return;
  ZM_CUDA_CHECK(cudaSetDevice(device));
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace detail
}  // namespace zimage_mxfp8
