// Arrays that arrive from Python through the buffer protocol or DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace zimage_mxfp8::python {

// Memory of a Python array, kept alive while this object lives. Create and destroy it with the
// GIL held; reading its fields needs no GIL.
class Array {
 public:
  enum class Access { kRead, kWrite };
  enum class Memory { kHost, kHostOrCuda };

  // `name` appears in error messages. Objects with __dlpack__ that do not export a buffer go
  // through DLPack, everything else through the buffer protocol. Throws InvalidArgument for memory
  // of a device that `memory` does not allow, a read-only array that would be written, or an object
  // that is not an array.
  Array(const pybind11::object& object, const char* name, Access access,
        Memory memory = Memory::kHost);

  // The CUDA device that holds the array, -1 for the host.
  int device() const { return device_; }
  std::uint8_t* data() const { return data_; }
  std::int64_t item_size() const { return item_size_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  // In elements.
  const std::vector<std::int64_t>& strides() const { return strides_; }
  const char* name() const { return name_; }

  // Throws InvalidArgument unless the array is C-contiguous and has `bytes` bytes.
  void require_contiguous(std::int64_t bytes) const;

 private:
  void import_buffer(const pybind11::object& object, Access access);
  void import_dlpack(const pybind11::object& object, Memory memory);

  const char* name_;
  std::uint8_t* data_ = nullptr;
  int device_ = -1;
  std::int64_t item_size_ = 0;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::shared_ptr<void> owner_;
};

// Arguments of Array's constructor.
inline constexpr auto kRead = Array::Access::kRead;
inline constexpr auto kWrite = Array::Access::kWrite;
inline constexpr auto kAnywhere = Array::Memory::kHostOrCuda;

// The device() that all arrays share. Throws InvalidArgument if they are on several.
int common_device(const std::vector<const Array*>& arrays);

}  // namespace zimage_mxfp8::python
