#include "python/array.h"

#include <algorithm>
#include <string>

#include "python/dlpack.h"
#include "zimage_mxfp8/error.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {

Array::Array(const py::object& object, const char* name, Access access, Memory memory)
    : name_(name) {
  if (PyObject_CheckBuffer(object.ptr())) {
    import_buffer(object, access);
  } else if (py::hasattr(object, "__dlpack__")) {
    import_dlpack(object, memory);
  } else {
    throw InvalidArgument(std::string(name_) +
                          " must be an array with the buffer protocol or DLPack");
  }
}

void Array::import_buffer(const py::object& object, Access access) {
  const auto view = std::shared_ptr<Py_buffer>(new Py_buffer{}, [](Py_buffer* buffer) {
    PyBuffer_Release(buffer);
    delete buffer;
  });
  const int flags = PyBUF_STRIDES | (access == Access::kWrite ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), view.get(), flags) != 0) {
    PyErr_Clear();
    throw InvalidArgument(std::string(name_) + (access == Access::kWrite
                                                    ? " must be a writable array"
                                                    : " does not export a strided buffer"));
  }
  if (view->itemsize == 0) {
    throw InvalidArgument(std::string(name_) + " has elements without bytes");
  }
  data_ = static_cast<std::uint8_t*>(view->buf);
  item_size_ = view->itemsize;
  shape_.assign(view->shape, view->shape + view->ndim);
  for (int i = 0; i < view->ndim; ++i) {
    if (view->strides[i] % view->itemsize != 0) {
      throw InvalidArgument(std::string(name_) + " has strides that are not whole elements");
    }
    strides_.push_back(view->strides[i] / view->itemsize);
  }
  owner_ = view;
}

void Array::import_dlpack(const py::object& object, Memory memory) {
  // Asked first: exporting from a device may synchronise it.
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  const bool on_cuda = device.first == dlpack::kCUDA && memory == Memory::kHostOrCuda;
  if (device.first != dlpack::kCPU && !on_cuda) {
    throw InvalidArgument(std::string(name_) + " is not in CPU memory" +
                          (memory == Memory::kHostOrCuda ? " nor in that of a CUDA device" : ""));
  }
  if (on_cuda) device_ = device.second;
  // Stream -1: no synchronisation. The caller passes the stream that it works on, and a graph that
  // is being captured stays intact.
  const py::object exported =
      on_cuda ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
  auto* managed =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(exported.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  PyCapsule_SetName(exported.ptr(), "used_dltensor");
  owner_ = std::shared_ptr<void>(managed, [](void* pointer) {
    auto* tensor = static_cast<dlpack::ManagedTensor*>(pointer);
    if (tensor->deleter) tensor->deleter(tensor);
  });

  const dlpack::Tensor& tensor = managed->tensor;
  if (tensor.dtype.bits % 8 != 0 || tensor.dtype.lanes != 1) {
    throw InvalidArgument(std::string(name_) + " has elements that are not whole bytes");
  }
  data_ = static_cast<std::uint8_t*>(tensor.data) + tensor.byte_offset;
  item_size_ = tensor.dtype.bits / 8;
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  strides_.resize(shape_.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape_.size(); i-- > 0;) {
    strides_[i] = tensor.strides ? tensor.strides[i] : stride;
    stride *= shape_[i];
  }
}

void Array::require_contiguous(std::int64_t bytes) const {
  std::int64_t count = 1;
  const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
  for (std::size_t i = shape_.size(); i-- > 0;) {
    if (!empty && shape_[i] != 1 && strides_[i] != count) {
      throw InvalidArgument(std::string(name_) + " must be C-contiguous");
    }
    count *= shape_[i];
  }
  if (count * item_size_ != bytes) {
    throw InvalidArgument(std::string(name_) + " must have " + std::to_string(bytes) +
                          " bytes, not " + std::to_string(count * item_size_));
  }
}

int common_device(const std::vector<const Array*>& arrays) {
  const Array& first = *arrays.front();
  const auto place = [](const Array& array) {
    return array.device() < 0 ? "the CPU" : "CUDA device " + std::to_string(array.device());
  };
  for (const Array* array : arrays) {
    if (array->device() == first.device()) continue;
    const std::string name = first.name(), other = array->name();
    throw InvalidArgument(
        name == other  // codes and scales of an operand
            ? name + " is partly on " + place(first) + " and partly on " + place(*array)
            : name + " is on " + place(first) + " but " + other + " is on " + place(*array));
  }
  return first.device();
}

}  // namespace zimage_mxfp8::python
