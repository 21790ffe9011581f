#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "python/array.h"
#include "python/register.h"
#include "zimage_mxfp8/cast.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/residual.h"
#include "zimage_mxfp8/scale_layout.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {
namespace {

DType parse_dtype(const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "float32") return DType::kFloat32;
  throw InvalidArgument("unsupported dtype \"" + name + "\": use bfloat16, float16 or float32");
}

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

template <typename View>
View mxfp8(const Array& codes, const Array& scales, std::int64_t rows, std::int64_t cols) {
  const MXFP8Shape shape{rows, cols};
  codes.require_contiguous(shape.code_bytes());
  scales.require_contiguous(shape.scale_bytes());
  return {codes.data(), scales.data(), rows, cols};
}

void py_quantize(const py::object& source, const std::string& dtype, const py::object& codes,
                 const py::object& scales, int threads) {
  const Array in(source, "source", Array::Access::kRead);
  const Array out_codes(codes, "codes", Array::Access::kWrite);
  const Array out_scales(scales, "scales", Array::Access::kWrite);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto target = mxfp8<MXFP8View>(out_codes, out_scales, view.rows, view.cols);
  const py::gil_scoped_release release;
  quantize(view, target, threads);
}

void py_dequantize(const py::object& codes, const py::object& scales, const py::object& target,
                   const std::string& dtype, int threads) {
  const Array in_codes(codes, "codes", Array::Access::kRead);
  const Array in_scales(scales, "scales", Array::Access::kRead);
  const Array out(target, "target", Array::Access::kWrite);
  const auto view = matrix<MatrixView>(out, dtype);
  const auto source = mxfp8<ConstMXFP8View>(in_codes, in_scales, view.rows, view.cols);
  const py::gil_scoped_release release;
  dequantize(source, view, threads);
}

py::object py_find_nonfinite(const py::object& source, const std::string& dtype, int threads) {
  const Array in(source, "source", Array::Access::kRead);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  std::optional<Position> at;
  {
    const py::gil_scoped_release release;
    at = find_nonfinite(view, threads);
  }
  if (!at) return py::none();
  return py::make_tuple(at->row, at->column);
}

void py_cast(const py::object& source, const std::string& source_dtype, const py::object& target,
             const std::string& target_dtype, int threads) {
  const Array in(source, "source", Array::Access::kRead);
  const Array out(target, "target", Array::Access::kWrite);
  const auto from = matrix<ConstMatrixView>(in, source_dtype);
  const auto to = matrix<MatrixView>(out, target_dtype);
  const py::gil_scoped_release release;
  cast(from, to, threads);
}

py::tuple py_measure_residual(const py::object& original, const std::string& dtype,
                              const py::object& codes, const py::object& scales, int threads) {
  const Array in(original, "original", Array::Access::kRead);
  const Array in_codes(codes, "codes", Array::Access::kRead);
  const Array in_scales(scales, "scales", Array::Access::kRead);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto quantized = mxfp8<ConstMXFP8View>(in_codes, in_scales, view.rows, view.cols);
  ResidualStats stats;
  {
    const py::gil_scoped_release release;
    stats = measure_residual(view, quantized, threads);
  }
  return py::make_tuple(stats.squared_error, stats.squared_signal, stats.max_error);
}

void py_residual_times_vector(const py::object& original, const std::string& dtype,
                              const py::object& codes, const py::object& scales,
                              const py::object& x, const py::object& out, int threads) {
  const Array in(original, "original", Array::Access::kRead);
  const Array in_codes(codes, "codes", Array::Access::kRead);
  const Array in_scales(scales, "scales", Array::Access::kRead);
  const Array in_x(x, "x", Array::Access::kRead);
  const Array out_array(out, "out", Array::Access::kWrite);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto quantized = mxfp8<ConstMXFP8View>(in_codes, in_scales, view.rows, view.cols);
  in_x.require_contiguous(view.cols * static_cast<std::int64_t>(sizeof(double)));
  out_array.require_contiguous(view.rows * static_cast<std::int64_t>(sizeof(double)));
  const py::gil_scoped_release release;
  residual_times_vector(view, quantized, reinterpret_cast<const double*>(in_x.data()),
                        reinterpret_cast<double*>(out_array.data()), threads);
}

// Both directions of the scale layout: the row-major side gives the size.
template <typename Convert>
void convert_layout(const py::object& row_major, Array::Access row_major_access,
                    const py::object& blocked, Array::Access blocked_access, Convert convert) {
  const Array plain(row_major, "row_major", row_major_access);
  const Array tiles(blocked, "blocked", blocked_access);
  if (plain.shape().size() != 2) throw InvalidArgument("row_major must have 2 dimensions");
  const std::int64_t rows = plain.shape()[0], cols = plain.shape()[1];
  plain.require_contiguous(rows * cols);
  tiles.require_contiguous(round_up(rows, 128) * round_up(cols, 4));
  const py::gil_scoped_release release;
  convert(plain.data(), rows, cols, tiles.data());
}

void py_to_blocked(const py::object& row_major, const py::object& blocked) {
  convert_layout(row_major, Array::Access::kRead, blocked, Array::Access::kWrite, to_blocked);
}

void py_from_blocked(const py::object& blocked, const py::object& row_major) {
  convert_layout(row_major, Array::Access::kWrite, blocked, Array::Access::kRead,
                 [](std::uint8_t* plain, std::int64_t rows, std::int64_t cols,
                    const std::uint8_t* tiles) { from_blocked(tiles, rows, cols, plain); });
}

}  // namespace

void register_codec(py::module_& module) {
  using py::arg;
  module.def("quantize", &py_quantize, arg("source"), arg("dtype"), arg("codes"), arg("scales"),
             arg("threads") = 0);
  module.def("dequantize", &py_dequantize, arg("codes"), arg("scales"), arg("target"), arg("dtype"),
             arg("threads") = 0);
  module.def("find_nonfinite", &py_find_nonfinite, arg("source"), arg("dtype"), arg("threads") = 0);
  module.def("cast", &py_cast, arg("source"), arg("source_dtype"), arg("target"),
             arg("target_dtype"), arg("threads") = 0);
  module.def("measure_residual", &py_measure_residual, arg("original"), arg("dtype"), arg("codes"),
             arg("scales"), arg("threads") = 0);
  module.def("residual_times_vector", &py_residual_times_vector, arg("original"), arg("dtype"),
             arg("codes"), arg("scales"), arg("x"), arg("out"), arg("threads") = 0);
  module.def("to_blocked", &py_to_blocked, arg("row_major"), arg("blocked"));
  module.def("from_blocked", &py_from_blocked, arg("blocked"), arg("row_major"));
}

}  // namespace zimage_mxfp8::python
