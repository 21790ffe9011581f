// The part of the CUDA runtime that the operations need, without its headers.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {

inline constexpr const char* kNoCuda =
    "this build has no CUDA kernels: install nvcc 12.8 or newer and build it with ZM_CUDA=ON";

// The devices, looked up once.
const std::vector<CudaDevice>& known_devices();

// The device with that index. Throws Unsupported if it does not exist.
const CudaDevice& find_device(int index);

int current_device();

int multiprocessors(int device);

// Throws InvalidArgument unless all (non-empty) ranges are memory of the current device.
void check_device_memory(std::initializer_list<MemoryRange> ranges);

// Throws InvalidArgument unless a matrix and its MXFP8 encoding are memory of the current device,
// aligned as the kernels need it.
void check_device_pair(const PairRanges& memory, DType dtype);

// Makes a device current for a scope. A negative index changes nothing.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

[[noreturn]] void throw_cuda_error(int code, const char* expression, const char* file, int line);

}  // namespace zimage_mxfp8::detail

#ifdef __FILE_NAME__
#define ZM_FILE_NAME __FILE_NAME__
#else
#define ZM_FILE_NAME __FILE__
#endif

// Throws CudaError unless `expression` is cudaSuccess.
#define ZM_CUDA_CHECK(expression)                                                               \
  do {                                                                                          \
    const cudaError_t zm_status = (expression);                                                 \
    if (zm_status != cudaSuccess) {                                                             \
      ::zimage_mxfp8::detail::throw_cuda_error(zm_status, #expression, ZM_FILE_NAME, __LINE__); \
    }                                                                                           \
  } while (false)
