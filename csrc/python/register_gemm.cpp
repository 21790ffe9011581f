#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <string>
#include <tuple>
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

using Operand = FormattedMatrix<ConstMatrixView, ConstMXFP8View, ConstRowScaledView, ConstInt8View>;

using Activation = FormattedMatrix<MatrixView, MXFP8View, RowScaledView, Int8View>;

const char* text(OperandFormat format) {
  switch (format) {
    case OperandFormat::kBFloat16:
      return "bfloat16";
    case OperandFormat::kMXFP8:
      return "mxfp8";
    case OperandFormat::kRowScaled:
      return "row-scaled";
    case OperandFormat::kInt8:
      return "int8";
  }
  return "";
}

// Operands and workspace of a call.
struct Call {
  Operand a, b;
  std::optional<Array> workspace;
  std::deque<Array> others;
  std::vector<const Array*> arrays;

  Call(const py::tuple& a_parts, const py::tuple& b_parts, const py::object& workspace_array)
      : a(a_parts, "A", kRead), b(b_parts, "B", kRead) {
    arrays = {&a.data, &b.data};
    if (!workspace_array.is_none()) {
      workspace.emplace(workspace_array, "the workspace", kWrite, kAnywhere);
      arrays.push_back(&*workspace);
    }
    for (const Operand* operand : {&a, &b}) {
      if (operand->scales) arrays.push_back(&*operand->scales);
    }
  }

  // An array that the call reads, and keeps until its end.
  const Array& read(const py::object& array, const char* name) {
    others.emplace_back(array, name, kRead, kAnywhere);
    arrays.push_back(&others.back());
    return others.back();
  }

  Workspace space() const {
    if (!workspace) return {};
    std::int64_t bytes = workspace->item_size();
    for (const std::int64_t size : workspace->shape()) bytes *= size;
    workspace->require_contiguous(bytes);
    return {workspace->data(), static_cast<std::size_t>(bytes)};
  }

  // Runs on the device that holds the arrays.
  void run(const std::string& kernel, const GemmArguments& arguments, int threads,
           std::uintptr_t stream) const {
    const int device = common_device(arrays);
    const GemmKernel& chosen = find_gemm_kernel(kernel);
    const Workspace memory = space();
    const py::gil_scoped_release release;
    if (device < 0) {
      const Support support = supports(chosen, problem_of(arguments), kHost);
      if (!support) throw Unsupported(support.reason);
      return gemm(arguments, threads);
    }
    const detail::DeviceGuard guard(device);
    gemm(chosen, arguments, memory, cuda_stream(stream));
  }
};

void py_gemm(const std::string& kernel, const py::tuple& a, const py::tuple& b,
             const py::object& bias, const py::object& d, const std::string& dtype,
             const py::object& workspace, int threads, std::uintptr_t stream) {
  Call call(a, b, workspace);
  const Array out(d, "D", kWrite, kAnywhere);
  call.arrays.push_back(&out);
  const Array* const bias_array = bias.is_none() ? nullptr : &call.read(bias, "the bias");
  const auto matrix_d = matrix<MatrixView>(out, dtype);
  GemmArguments arguments{call.a.view, call.b.view, nullptr, matrix_d};
  if (bias_array) {
    bias_array->require_contiguous(matrix_d.cols * 2);
    arguments.bias = bias_array->data();
  }
  call.run(kernel, arguments, threads, stream);
}

// The arguments of an epilogue from Python, in the order of its struct in gemm.h.
EpilogueArguments read_epilogue(GemmEpilogue epilogue, const py::tuple& values, Call& call) {
  switch (epilogue) {
    case GemmEpilogue::kNone:
      return {};
    case GemmEpilogue::kSiluMultiply:
      return SiluMultiply{};
    case GemmEpilogue::kRotateHeads: {
      const Array& q = call.read(values[0], "q_weight");
      const Array& k = call.read(values[1], "k_weight");
      const Array& rotations = call.read(values[2], "rotations");
      q.require_contiguous(kHeadSize * 2);
      k.require_contiguous(kHeadSize * 2);
      return RotateHeads{q.data(),
                         k.data(),
                         matrix<ConstMatrixView>(rotations, "float32"),
                         values[3].cast<std::int64_t>(),
                         values[4].cast<std::int64_t>(),
                         values[5].cast<float>()};
    }
  }
  throw InvalidArgument(std::string("no arguments are read for ") + info(epilogue).name);
}

// X and U of a low-rank addend from Python: a tuple of both, or None.
std::optional<LowRankAddend> read_addend(const py::object& parts, Call& call) {
  if (parts.is_none()) return std::nullopt;
  const py::tuple both = parts.cast<py::tuple>();
  const Array& x = call.read(both[0], "the addend's X");
  const Array& u = call.read(both[1], "the addend's U");
  return LowRankAddend{matrix<ConstMatrixView>(x, "bfloat16"),
                       matrix<ConstMatrixView>(u, "bfloat16")};
}

void py_gemm_with_epilogue(const std::string& kernel, const py::tuple& a, const py::tuple& b,
                           const py::object& addend, const std::string& epilogue,
                           const py::tuple& values, const py::tuple& d, const py::object& workspace,
                           std::uintptr_t stream) {
  Call call(a, b, workspace);
  const Activation out(d, "D", kWrite);
  call.arrays.push_back(&out.data);
  if (out.scales) call.arrays.push_back(&*out.scales);
  const EpilogueArguments arguments = read_epilogue(find_gemm_epilogue(epilogue), values, call);
  const std::optional<LowRankAddend> low_rank = read_addend(addend, call);
  call.run(kernel, {call.a.view, call.b.view, nullptr, out.view, arguments, low_rank}, 1, stream);
}

void py_narrow_gemm(const py::tuple& a, const py::tuple& b, const py::object& factors,
                    const py::object& d, std::uintptr_t stream) {
  Call call(a, b, py::none());
  const Array out(d, "D", kWrite, kAnywhere);
  call.arrays.push_back(&out);
  const auto target = matrix<MatrixView>(out, "bfloat16");
  const Array& of_columns = call.read(factors, "the factors");
  of_columns.require_contiguous(target.cols * 4);
  const int device = common_device(call.arrays);
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  narrow_gemm(call.a.view, call.b.view, reinterpret_cast<const float*>(of_columns.data()), target,
              cuda_stream(stream));
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

// A row of the table of kernels.
struct KernelInfo {
  std::string name;
  std::vector<std::pair<std::string, std::string>> operands;
  std::vector<std::string> epilogues;
};

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos;
  for (const GemmKernel* kernel : gemm_kernels()) {
    KernelInfo row{name(*kernel), {}, {}};
    for (const auto& [a, b] : operand_formats(*kernel)) row.operands.emplace_back(text(a), text(b));
    for (const GemmEpilogue one : epilogues(*kernel)) row.epilogues.emplace_back(info(one).name);
    infos.push_back(std::move(row));
  }
  return infos;
}

}  // namespace

void register_gemm(py::module_& module) {
  using py::arg;
  module.def("cublaslt_version", &cublaslt_version, py::call_guard<py::gil_scoped_release>(),
             "Return the version of the cuBLASLt that is used, such as 13.1.0; empty without one.");
  py::class_<GemmProblem>(module, "GemmProblem", "A GEMM to compute, without its data.")
      .def(py::init([](std::int64_t m, std::int64_t n, std::int64_t k, const std::string& a,
                       const std::string& b, const std::string& dtype, bool bias,
                       const std::string& epilogue, const std::string& d_format,
                       std::int64_t addend_rank) {
             return GemmProblem{m,
                                n,
                                k,
                                parse_format(a),
                                parse_format(b),
                                parse_dtype(dtype),
                                bias,
                                find_gemm_epilogue(epilogue),
                                parse_format(d_format),
                                addend_rank};
           }),
           arg("m"), arg("n"), arg("k"), arg("a"), arg("b"), arg("dtype"), arg("bias"),
           arg("epilogue") = "none", arg("d_format") = "bfloat16", arg("addend_rank") = 0);
  py::class_<EpilogueInfo>(module, "GemmEpilogue", "A row of the table of epilogues.")
      .def_readonly("name", &EpilogueInfo::name)
      .def_readonly("rows_per_column", &EpilogueInfo::rows_per_column)
      .def_readonly("encodes", &EpilogueInfo::encodes);
  module.def(
      "gemm_epilogues",
      [] {
        std::vector<EpilogueInfo> infos;
        for (const GemmEpilogue one : gemm_epilogues()) infos.push_back(info(one));
        return infos;
      },
      "Return the epilogues in the order of their table; the first is \"none\".");
  py::class_<KernelInfo>(module, "GemmKernel", "A kernel of the table.")
      .def_readonly("name", &KernelInfo::name)
      .def_readonly("operands", &KernelInfo::operands)
      .def_readonly("epilogues", &KernelInfo::epilogues);
  module.def("gemm_kernels", &kernel_infos, "Return the table of kernels, which all builds have.");
  module.def(
      "gemm_unsupported",
      [](const std::string& kernel, const GemmProblem& problem, int device) {
        return supports(find_gemm_kernel(kernel), problem, device).reason;
      },
      arg("kernel"), arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>(),
      "Return why a kernel does not compute a problem on a device (-1: CPU); empty if it "
      "does.");
  module.def(
      "choose_gemm",
      [](const GemmProblem& problem, int device) { return name(choose_gemm(problem, device)); },
      arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>(),
      "Return the name of the kernel of least cost.");
  module.def(
      "explain_gemm",
      [](const GemmProblem& problem, int device) {
        std::vector<std::tuple<std::string, bool, double, std::string>> result;
        for (const GemmCandidate& one : explain_gemm(problem, device)) {
          result.emplace_back(name(*one.kernel), one.fuses_epilogue, one.cost, one.reason);
        }
        return result;
      },
      arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>(),
      "Return per kernel: name, whether it fuses the epilogue, cost, why it is not chosen.");
  module.def(
      "gemm_workspace_size",
      [](const std::string& kernel, const GemmProblem& problem, int device) {
        return workspace_size(find_gemm_kernel(kernel), problem, device);
      },
      arg("kernel"), arg("problem"), arg("device"), py::call_guard<py::gil_scoped_release>(),
      "Return the bytes of workspace that a kernel needs.");
  module.def("gemm", &py_gemm, arg("kernel"), arg("a"), arg("b"), arg("bias"), arg("d"),
             arg("dtype"), arg("workspace"), arg("threads") = 0, arg("stream") = 0,
             "Compute D [M, N] = A [M, K] B [N, K]^T + bias [N] with a kernel of the table.");
  module.def("gemm_with_epilogue", &py_gemm_with_epilogue, arg("kernel"), arg("a"), arg("b"),
             arg("addend"), arg("epilogue"), arg("arguments"), arg("d"), arg("workspace"),
             arg("stream") = 0,
             "Compute a GEMM, a low-rank addend (X, U) or None, and an epilogue of gemm.h.");
  module.def("narrow_gemm", &py_narrow_gemm, arg("a"), arg("b"), arg("factors"), arg("d"),
             arg("stream") = 0,
             "Compute D [M, R] = factors [R] * A [M, K] B^T, see narrow_gemm in gemm.h.");
  module.def("quantize_rows", &py_quantize_rows, arg("source"), arg("dtype"), arg("codes"),
             arg("scales"), arg("threads") = 0, arg("stream") = 0);
  module.def("fold", &py_fold, arg("codes"), arg("scales"), arg("rows"), arg("cols"),
             arg("out_codes"), arg("out_scales"), arg("bound"), arg("threads") = 0);
  module.def("fold_async", &py_fold_async, arg("codes"), arg("scales"), arg("rows"), arg("cols"),
             arg("out_codes"), arg("out_scales"), arg("stats"), arg("stream") = 0);
  module.def("fold_stats", &py_fold_stats, arg("stats"), arg("bound"));
}

}  // namespace zimage_mxfp8::python
