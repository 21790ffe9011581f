// Arrays from Python as the views that operations take.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "python/array.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::python {

// Throws InvalidArgument unless `name` is "bfloat16", "float16" or "float32".
inline DType parse_dtype(const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "float32") return DType::kFloat32;
  throw InvalidArgument("unsupported dtype \"" + name + "\": use bfloat16, float16 or float32");
}

// A ConstMatrixView or MatrixView of an array. Throws InvalidArgument if it is not a matrix of that
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

// A ConstRowScaledView or RowScaledView.
template <typename View>
View row_scaled(const Array& codes, const Array& scales) {
  if (codes.shape().size() != 2) {
    throw InvalidArgument(std::string(codes.name()) + " must have 2 dimensions");
  }
  const std::int64_t rows = codes.shape()[0], cols = codes.shape()[1];
  codes.require_contiguous(rows * cols);
  scales.require_contiguous(rows * static_cast<std::int64_t>(sizeof(float)));
  return {codes.data(), reinterpret_cast<float*>(scales.data()), rows, cols};
}

inline OperandFormat parse_format(const std::string& name) {
  if (name == "bfloat16") return OperandFormat::kBFloat16;
  if (name == "mxfp8") return OperandFormat::kMXFP8;
  if (name == "row-scaled") return OperandFormat::kRowScaled;
  if (name == "int8") return OperandFormat::kInt8;
  throw InvalidArgument("unknown operand format \"" + name + "\"");
}

// A matrix in one of four formats, as Python describes it: (format, elements or codes, scales or
// None, rows, cols).
template <typename Plain, typename MXFP8, typename RowScaled, typename Int8>
struct FormattedMatrix {
  Array data;
  std::optional<Array> scales;
  std::variant<Plain, MXFP8, RowScaled, Int8> view;

  FormattedMatrix(const pybind11::tuple& parts, const char* name, Array::Access access)
      : data(parts[1], name, access, kAnywhere) {
    const OperandFormat format = parse_format(parts[0].cast<std::string>());
    if (format == OperandFormat::kBFloat16) {
      view = matrix<Plain>(data, "bfloat16");
      return;
    }
    scales.emplace(parts[2], name, access, kAnywhere);
    if (format == OperandFormat::kRowScaled) {
      view = row_scaled<RowScaled>(data, *scales);
    } else if (format == OperandFormat::kInt8) {
      const auto rows = row_scaled<RowScaledView>(data, *scales);
      view = Int8{reinterpret_cast<std::int8_t*>(rows.codes), rows.scales, rows.rows, rows.cols};
    } else {
      view =
          mxfp8<MXFP8>(data, *scales, parts[3].cast<std::int64_t>(), parts[4].cast<std::int64_t>());
    }
  }
};

// The address of a cudaStream_t, as Python hands it over.
inline CudaStream cuda_stream(std::uintptr_t address) { return {reinterpret_cast<void*>(address)}; }

}  // namespace zimage_mxfp8::python
