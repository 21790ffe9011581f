// The memory layout of DLPack tensors, from the specification (dmlc.github.io/dlpack, the
// unversioned ABI that "dltensor" capsules carry).
#pragma once

#include <cstdint>

namespace zimage_mxfp8::python::dlpack {

inline constexpr std::int32_t kCPU = 1;
inline constexpr std::int32_t kCUDA = 2;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null for C-contiguous
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace zimage_mxfp8::python::dlpack
