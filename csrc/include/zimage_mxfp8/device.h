// CUDA streams and devices, and this build's support for them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace zimage_mxfp8 {

// A CUDA stream of the current device: a cudaStream_t as an opaque pointer, so that these headers
// need no CUDA. nullptr is the default stream.
//
// Operations that take a stream work on memory of the current CUDA device. They launch kernels on
// the stream and return; they neither allocate device memory nor synchronise, and can be captured
// in a CUDA graph. All throw Unsupported in a build without CUDA, InvalidArgument for memory that
// the current device does not own, and CudaError if CUDA fails.
struct CudaStream {
  void* handle = nullptr;
};

struct CudaDevice {
  int index;
  std::string name;
  int major;  // compute capability
  int minor;
  int multiprocessors;
  std::size_t memory;  // bytes
};

// The devices that the CUDA runtime sees; empty without a driver, a device or a CUDA build.
std::vector<CudaDevice> cuda_devices();

// The compute capability that devices are taken to have at most, for tests of what older devices
// do: 80 if the environment variable ZIMAGE_MXFP8_CAPABILITY is 8.0. 0 without it. Throws
// InvalidArgument if it is no compute capability. It is read once.
int capability_limit();

struct BuildInfo {
  std::string version;                     // of this library
  std::string cuda;                        // version of the CUDA compiler; empty without CUDA
  std::string no_cuda;                     // why the build is without CUDA; empty with CUDA
  std::string cutlass;                     // version of CUTLASS; empty where it was not used
  std::vector<std::string> architectures;  // CUDA targets compiled in, such as "90a" or "120f"
};

BuildInfo build_info();

}  // namespace zimage_mxfp8
