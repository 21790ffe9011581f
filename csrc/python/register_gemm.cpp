#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/runtime.h"
#include "python/array.h"
#include "python/register.h"
#include "python/views.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/row_scaled.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {
namespace {

using Operand = FormattedMatrix<ConstMatrixView, ConstMXFP8View, ConstRowScaledView>;

void py_gemm(const std::string& path, const py::tuple& a, const py::tuple& b,
             const py::object& bias, const py::object& d, const std::string& dtype,
             const py::object& workspace, int threads, std::uintptr_t stream) {
  const Operand a_operand(a, "A", kRead), b_operand(b, "B", kRead);
  const Array out(d, "D", kWrite, kAnywhere);
  std::optional<Array> bias_array, workspace_array;
  if (!bias.is_none()) bias_array.emplace(bias, "the bias", kRead, kAnywhere);
  if (!workspace.is_none()) workspace_array.emplace(workspace, "the workspace", kWrite, kAnywhere);

  std::vector<const Array*> arrays{&a_operand.data, &b_operand.data, &out};
  for (const std::optional<Array>* array :
       {&a_operand.scales, &b_operand.scales, &std::as_const(bias_array),
        &std::as_const(workspace_array)}) {
    if (*array) arrays.push_back(&**array);
  }
  const int device = common_device(arrays);
  GemmArguments arguments{a_operand.view, b_operand.view, nullptr, matrix<MatrixView>(out, dtype)};
  if (bias_array) {
    bias_array->require_contiguous(arguments.d.cols * 2);
    arguments.bias = bias_array->data();
  }
  const GemmPath chosen = gemm_path(path);
  if (device < 0) {
    if (chosen != GemmPath::kEmulated) {
      throw Unsupported(path + " needs a CUDA device; on the CPU there is only \"emulated\"");
    }
    const py::gil_scoped_release release;
    return gemm(arguments, threads);
  }
  Workspace space;
  if (workspace_array) {
    std::int64_t bytes = workspace_array->item_size();
    for (const std::int64_t size : workspace_array->shape()) bytes *= size;
    workspace_array->require_contiguous(bytes);
    space = {workspace_array->data(), static_cast<std::size_t>(bytes)};
  }
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  gemm(chosen, arguments, space, cuda_stream(stream));
}

void py_quantize_rows(const py::object& source, const std::string& dtype, const py::object& codes,
                      const py::object& scales, int threads, std::uintptr_t stream) {
  const Array in(source, "source", kRead, kAnywhere);
  const Array out_codes(codes, "codes", kWrite, kAnywhere);
  const Array out_scales(scales, "scales", kWrite, kAnywhere);
  const auto view = matrix<ConstMatrixView>(in, dtype);
  const auto target = row_scaled<RowScaledView>(out_codes, out_scales);
  const int device = common_device({&in, &out_codes, &out_scales});
  const py::gil_scoped_release release;
  if (device < 0) return quantize_rows(view, target, threads);
  const detail::DeviceGuard guard(device);
  quantize_rows(view, target, cuda_stream(stream));
}

py::tuple py_fold(const py::object& codes, const py::object& scales, std::int64_t rows,
                  std::int64_t cols, const py::object& out_codes, const py::object& out_scales,
                  double bound, int threads) {
  const Array in_codes(codes, "codes", kRead), in_scales(scales, "scales", kRead);
  const Array to_codes(out_codes, "out_codes", kWrite), to_scales(out_scales, "out_scales", kWrite);
  const auto source = mxfp8<ConstMXFP8View>(in_codes, in_scales, rows, cols);
  const auto target = row_scaled<RowScaledView>(to_codes, to_scales);
  FoldStats stats;
  {
    const py::gil_scoped_release release;
    stats = fold(source, target, bound, threads);
  }
  return py::make_tuple(stats.changed, stats.relative_error);
}

void py_fold_async(const py::object& codes, const py::object& scales, std::int64_t rows,
                   std::int64_t cols, const py::object& out_codes, const py::object& out_scales,
                   const py::object& stats, std::uintptr_t stream) {
  const Array in_codes(codes, "codes", kRead, kAnywhere);
  const Array in_scales(scales, "scales", kRead, kAnywhere);
  const Array to_codes(out_codes, "out_codes", kWrite, kAnywhere);
  const Array to_scales(out_scales, "out_scales", kWrite, kAnywhere);
  const Array to_stats(stats, "the statistics", kWrite, kAnywhere);
  const auto source = mxfp8<ConstMXFP8View>(in_codes, in_scales, rows, cols);
  const auto target = row_scaled<RowScaledView>(to_codes, to_scales);
  to_stats.require_contiguous(rows * static_cast<std::int64_t>(sizeof(FoldRowStats)));
  const int device = common_device({&in_codes, &in_scales, &to_codes, &to_scales, &to_stats});
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  fold(source, target, reinterpret_cast<FoldRowStats*>(to_stats.data()), cuda_stream(stream));
}

py::tuple py_fold_stats(const py::object& stats, double bound) {
  const Array of_rows(stats, "the statistics", kRead);
  const std::int64_t rows = of_rows.shape().empty() ? 0 : of_rows.shape()[0];
  of_rows.require_contiguous(rows * static_cast<std::int64_t>(sizeof(FoldRowStats)));
  const FoldStats result =
      fold_stats(reinterpret_cast<const FoldRowStats*>(of_rows.data()), rows, bound);
  return py::make_tuple(result.changed, result.relative_error);
}

}  // namespace

void register_gemm(py::module_& module) {
  using py::arg;
  module.def("gemm_paths", [] {
    std::vector<std::string> names;
    for (const GemmPath path : all_gemm_paths()) names.emplace_back(name(path));
    return names;
  });
  module.def("cublaslt_version", &cublaslt_version, py::call_guard<py::gil_scoped_release>());
  py::class_<GemmProblem>(module, "GemmProblem")
      .def(py::init([](std::int64_t m, std::int64_t n, std::int64_t k, const std::string& a,
                       const std::string& b, const std::string& dtype, bool bias) {
             return GemmProblem{m,   n, k, parse_format(a), parse_format(b), parse_dtype(dtype),
                                bias};
           }),
           arg("m"), arg("n"), arg("k"), arg("a"), arg("b"), arg("dtype"), arg("bias"));
  // Why the path does not support the problem on the device (-1: the CPU); empty if it does.
  module.def(
      "gemm_unsupported",
      [](const std::string& path, const GemmProblem& problem, int device) {
        return supports(gemm_path(path), problem, device).reason;
      },
      arg("path"), arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "gemm_preferred_path",
      [](const GemmProblem& problem, int device) { return name(preferred_path(problem, device)); },
      arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "gemm_workspace_size",
      [](const std::string& path, const GemmProblem& problem, int device) {
        return workspace_size(gemm_path(path), problem, device);
      },
      arg("path"), arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>());
  module.def("gemm", &py_gemm, arg("path"), arg("a"), arg("b"), arg("bias"), arg("d"), arg("dtype"),
             arg("workspace"), arg("threads") = 0, arg("stream") = 0);
  module.def("quantize_rows", &py_quantize_rows, arg("source"), arg("dtype"), arg("codes"),
             arg("scales"), arg("threads") = 0, arg("stream") = 0);
  module.def("fold", &py_fold, arg("codes"), arg("scales"), arg("rows"), arg("cols"),
             arg("out_codes"), arg("out_scales"), arg("bound"), arg("threads") = 0);
  module.def("fold_async", &py_fold_async, arg("codes"), arg("scales"), arg("rows"), arg("cols"),
             arg("out_codes"), arg("out_scales"), arg("stats"), arg("stream") = 0);
  module.def("fold_stats", &py_fold_stats, arg("stats"), arg("bound"));
}

}  // namespace zimage_mxfp8::python
