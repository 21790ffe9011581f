#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/runtime.h"
#include "python/array.h"
#include "python/register.h"
#include "python/views.h"
#include "zimage_mxfp8/cast.h"
#include "zimage_mxfp8/convrot.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/histogram.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/residual.h"
#include "zimage_mxfp8/scale_layout.h"
#include "zimage_mxfp8/staged_quantizer.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {
namespace {

void py_quantize(const py::object& source, const std::string& dtype, const py::object& codes,
                 const py::object& scales, int threads, std::uintptr_t stream) {
  const Array in(source, "source", kRead, kAnywhere);
  const Array out_codes(codes, "codes", kWrite, kAnywhere);
  const Array out_scales(scales, "scales", kWrite, kAnywhere);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto target = mxfp8<MXFP8View>(out_codes, out_scales, view.rows, view.cols);
  const int device = common_device({&in, &out_codes, &out_scales});
  const py::gil_scoped_release release;
  if (device < 0) return quantize(view, target, threads);
  const detail::DeviceGuard guard(device);
  quantize(view, target, cuda_stream(stream));
}

void py_dequantize(const py::object& codes, const py::object& scales, const py::object& target,
                   const std::string& dtype, int threads, std::uintptr_t stream) {
  const Array in_codes(codes, "codes", kRead, kAnywhere);
  const Array in_scales(scales, "scales", kRead, kAnywhere);
  const Array out(target, "target", kWrite, kAnywhere);
  const auto view = matrix<MatrixView>(out, dtype);
  const auto source = mxfp8<ConstMXFP8View>(in_codes, in_scales, view.rows, view.cols);
  const int device = common_device({&in_codes, &in_scales, &out});
  const py::gil_scoped_release release;
  if (device < 0) return dequantize(source, view, threads);
  const detail::DeviceGuard guard(device);
  dequantize(source, view, cuda_stream(stream));
}

void py_staged_quantize(StagedQuantizer& quantizer, const py::object& source,
                        const std::string& dtype, const py::object& codes,
                        const py::object& scales) {
  const Array in(source, "source", kRead);
  const Array out_codes(codes, "codes", kWrite);
  const Array out_scales(scales, "scales", kWrite);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto target = mxfp8<MXFP8View>(out_codes, out_scales, view.rows, view.cols);
  const py::gil_scoped_release release;
  quantizer.quantize(view, target);
}

// A ConstInt8View or Int8View of the shape of a matrix. Throws InvalidArgument for other sizes.
template <typename View>
View int8_matrix(const Array& codes, const Array& scales, std::int64_t rows, std::int64_t cols) {
  codes.require_contiguous(rows * cols);
  scales.require_contiguous(rows * static_cast<std::int64_t>(sizeof(float)));
  return {reinterpret_cast<std::int8_t*>(codes.data()), reinterpret_cast<float*>(scales.data()),
          rows, cols};
}

void py_quantize_convrot(const py::object& source, const std::string& dtype, std::int64_t group,
                         const py::object& codes, const py::object& scales, int threads) {
  const Array in(source, "source", kRead);
  const Array out_codes(codes, "codes", kWrite);
  const Array out_scales(scales, "scales", kWrite);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto target = int8_matrix<Int8View>(out_codes, out_scales, view.rows, view.cols);
  const py::gil_scoped_release release;
  quantize_convrot(view, group, target, threads);
}

void py_dequantize_convrot(const py::object& codes, const py::object& scales, std::int64_t group,
                           const py::object& target, const std::string& dtype, int threads) {
  const Array in_codes(codes, "codes", kRead);
  const Array in_scales(scales, "scales", kRead);
  const Array out(target, "target", kWrite);
  const auto view = matrix<MatrixView>(out, dtype);
  const auto source = int8_matrix<ConstInt8View>(in_codes, in_scales, view.rows, view.cols);
  const py::gil_scoped_release release;
  dequantize_convrot(source, group, view, threads);
}

std::optional<std::pair<std::int64_t, std::int64_t>> py_find_nonfinite(const py::object& source,
                                                                       const std::string& dtype,
                                                                       int threads) {
  const Array in(source, "source", kRead);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const py::gil_scoped_release release;
  const std::optional<Position> at = find_nonfinite(view, threads);
  if (!at) return std::nullopt;
  return std::make_pair(at->row, at->column);
}

void py_cast(const py::object& source, const std::string& source_dtype, const py::object& target,
             const std::string& target_dtype, int threads) {
  const Array in(source, "source", kRead);
  const Array out(target, "target", kWrite);
  const auto from = matrix<ConstMatrixView>(in, source_dtype);
  const auto to = matrix<MatrixView>(out, target_dtype);
  const py::gil_scoped_release release;
  cast(from, to, threads);
}

std::tuple<double, double, double> py_measure_residual(const py::object& original,
                                                       const std::string& dtype,
                                                       const py::object& codes,
                                                       const py::object& scales, int threads) {
  const Array in(original, "original", kRead);
  const Array in_codes(codes, "codes", kRead);
  const Array in_scales(scales, "scales", kRead);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto quantized = mxfp8<ConstMXFP8View>(in_codes, in_scales, view.rows, view.cols);
  const py::gil_scoped_release release;
  const ResidualStats stats = measure_residual(view, quantized, threads);
  return std::make_tuple(stats.squared_error, stats.squared_signal, stats.max_error);
}

void py_residual_times_vector(const py::object& original, const std::string& dtype,
                              const py::object& codes, const py::object& scales,
                              const py::object& x, const py::object& out, int threads) {
  const Array in(original, "original", kRead);
  const Array in_codes(codes, "codes", kRead);
  const Array in_scales(scales, "scales", kRead);
  const Array in_x(x, "x", kRead);
  const Array out_array(out, "out", kWrite);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto quantized = mxfp8<ConstMXFP8View>(in_codes, in_scales, view.rows, view.cols);
  in_x.require_contiguous(view.cols * static_cast<std::int64_t>(sizeof(double)));
  out_array.require_contiguous(view.rows * static_cast<std::int64_t>(sizeof(double)));
  const py::gil_scoped_release release;
  residual_times_vector(view, quantized, reinterpret_cast<const double*>(in_x.data()),
                        reinterpret_cast<double*>(out_array.data()), threads);
}

void py_count_bit_patterns(const py::object& matrix_object, const std::string& dtype,
                           const py::object& counts, int threads) {
  const Array in(matrix_object, "matrix", kRead);
  const Array out(counts, "counts", kWrite);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  out.require_contiguous(kBitPatterns * static_cast<std::int64_t>(sizeof(std::uint64_t)));
  const py::gil_scoped_release release;
  count_bit_patterns(view, reinterpret_cast<std::uint64_t*>(out.data()), threads);
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
  convert_layout(row_major, kRead, blocked, kWrite, to_blocked);
}

void py_from_blocked(const py::object& blocked, const py::object& row_major) {
  convert_layout(row_major, kWrite, blocked, kRead,
                 [](std::uint8_t* plain, std::int64_t rows, std::int64_t cols,
                    const std::uint8_t* tiles) { from_blocked(tiles, rows, cols, plain); });
}

}  // namespace

void register_codec(py::module_& module) {
  using py::arg;
  module.def("quantize", &py_quantize, arg("source"), arg("dtype"), arg("codes"), arg("scales"),
             arg("threads") = 0, arg("stream") = 0,
             "Encode [N, K] in MXFP8: codes [roundup(N, 32), roundup(K, 32)], blocked scales.");
  module.def("dequantize", &py_dequantize, arg("codes"), arg("scales"), arg("target"), arg("dtype"),
             arg("threads") = 0, arg("stream") = 0,
             "Decode MXFP8 codes and blocked scales to [N, K], the shape of the target.");
  module.def("quantize_convrot", &py_quantize_convrot, arg("source"), arg("dtype"), arg("group"),
             arg("codes"), arg("scales"), arg("threads") = 0,
             "Rotate [N, K] in groups of columns and encode it: int8 codes [N, K], float32 [N].");
  module.def("dequantize_convrot", &py_dequantize_convrot, arg("codes"), arg("scales"),
             arg("group"), arg("target"), arg("dtype"), arg("threads") = 0,
             "Decode int8 codes [N, K] and scales [N] and rotate back to the target, [N, K].");
  py::class_<StagedQuantizer>(module, "StagedQuantizer",
                              "An encoder on a CUDA device for matrices in host memory.")
      .def(py::init<int>(), arg("device"), py::call_guard<py::gil_scoped_release>(),
           "Allocate memory on a CUDA device, given by its index.")
      .def("quantize", &py_staged_quantize, arg("source"), arg("dtype"), arg("codes"),
           arg("scales"), "Encode [N, K] as the function `quantize` does; wait for the device.");
  module.def("find_nonfinite", &py_find_nonfinite, arg("source"), arg("dtype"), arg("threads") = 0,
             "Find the first NaN or infinity of [N, K]: its row and column, or None.");
  module.def("cast", &py_cast, arg("source"), arg("source_dtype"), arg("target"),
             arg("target_dtype"), arg("threads") = 0,
             "Convert [N, K] to another dtype, to nearest even.");
  module.def("measure_residual", &py_measure_residual, arg("original"), arg("dtype"), arg("codes"),
             arg("scales"), arg("threads") = 0,
             "Compare [N, K] with its encoding: sum of squared errors, of squares, largest error.");
  module.def("residual_times_vector", &py_residual_times_vector, arg("original"), arg("dtype"),
             arg("codes"), arg("scales"), arg("x"), arg("out"), arg("threads") = 0,
             "Multiply the change by encoding, [N, K], with x, float64 [K]: out, float64 [N].");
  module.def("count_bit_patterns", &py_count_bit_patterns, arg("matrix"), arg("dtype"),
             arg("counts"), arg("threads") = 0,
             "Add to counts, uint64 [65536], how often [N, K] has each 16-bit pattern.");
  module.def("to_blocked", &py_to_blocked, arg("row_major"), arg("blocked"),
             "Reorder scales [N, C] to the 128x4 blocked layout [roundup(N, 128), roundup(C, 4)].");
  module.def(
      "from_blocked", &py_from_blocked, arg("blocked"), arg("row_major"),
      "Reorder scales [roundup(N, 128), roundup(C, 4)] from the 128x4 blocked layout to [N, C].");
}

}  // namespace zimage_mxfp8::python
