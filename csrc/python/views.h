// Arrays from Python as the views that operations take.
#pragma once

#include <cstdint>
#include <string>

#include "python/array.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::python {

// Throws InvalidArgument unless `name` is "bfloat16", "float16" or "float32".
inline DType parse_dtype(const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "float32") return DType::kFloat32;
  throw InvalidArgument("unsupported dtype \"" + name + "\": use bfloat16, float16 or float32");
}

// A ConstMatrixView or MatrixView of an array. Throws InvalidArgument if it is no matrix of that
// dtype with adjacent elements in each row.
template <typename View>
View matrix(const Array& array, const std::string& dtype_name) {
  const DType dtype = parse_dtype(dtype_name);
  if (array.shape().size() != 2) {
    throw InvalidArgument(std::string(array.name()) + " must have 2 dimensions, not " +
                          std::to_string(array.shape().size()));
  }
  if (array.item_size() != static_cast<std::int64_t>(element_size(dtype))) {
    throw InvalidArgument(std::string(array.name()) + " has elements of " +
                          std::to_string(array.item_size()) + " bytes, which is not " + dtype_name);
  }
  const std::int64_t rows = array.shape()[0], cols = array.shape()[1];
  if (cols > 1 && array.strides()[1] != 1) {
    throw InvalidArgument(std::string(array.name()) + " must have adjacent elements in each row");
  }
  return {array.data(), dtype, rows, cols, rows > 1 ? array.strides()[0] : cols};
}

// A ConstMXFP8View or MXFP8View. Throws InvalidArgument if the arrays have other sizes.
template <typename View>
View mxfp8(const Array& codes, const Array& scales, std::int64_t rows, std::int64_t cols) {
  const MXFP8Shape shape{rows, cols};
  codes.require_contiguous(shape.code_bytes());
  scales.require_contiguous(shape.scale_bytes());
  return {codes.data(), scales.data(), rows, cols};
}

// The address of a cudaStream_t, as Python hands it over.
inline CudaStream cuda_stream(std::uintptr_t address) { return {reinterpret_cast<void*>(address)}; }

}  // namespace zimage_mxfp8::python
