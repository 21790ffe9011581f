#include "zimage_mxfp8/gemm.h"

#include <limits>
#include <memory>
#include <type_traits>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"
#include "gemm/gemm_cuda.h"

namespace zimage_mxfp8 {
namespace {

const char* text(OperandFormat format) {
  switch (format) {
    case OperandFormat::kBFloat16:
      return "BF16";
    case OperandFormat::kMXFP8:
      return "MXFP8";
    default:
      return "row-scaled FP8";
  }
}

std::string operands_text(const GemmProblem& problem) {
  return std::string(text(problem.a)) + " x " + text(problem.b);
}

void check_sizes(const GemmProblem& problem) {
  const std::int64_t most = std::numeric_limits<std::int32_t>::max();
  if (problem.m < 0 || problem.n < 0 || problem.k < 0 || problem.m > most || problem.n > most ||
      problem.k > most) {
    throw InvalidArgument("sizes of a product must be from 0 to 2^31 - 1");
  }
  if (problem.n % 8 != 0) {
    throw InvalidArgument("N must be a multiple of 8, not " + std::to_string(problem.n));
  }
  if (problem.k % kBlockSize != 0) {
    throw InvalidArgument("K must be a multiple of 32, not " + std::to_string(problem.k));
  }
}

std::string text(const CudaDevice& device) {
  return device.name + " (compute capability " + std::to_string(device.major) + "." +
         std::to_string(device.minor) + ")";
}

Support no(std::string reason) { return {false, std::move(reason)}; }
constexpr auto yes = [] { return Support{true, ""}; };

Support supports_on(GemmPath path, const GemmProblem& problem, const CudaDevice& device) {
  const int capability = device.major * 10 + device.minor;
  const auto has = [&](OperandFormat a, OperandFormat b) {
    return problem.a == a && problem.b == b;
  };
  const auto not_here = [&](const char* needed) {
    return no(std::string(name(path)) + " needs " + needed + ", and this is " + text(device));
  };
  const auto not_these = [&](const char* needed) {
    return no(std::string(name(path)) + " multiplies " + needed + ", not " +
              operands_text(problem));
  };
  switch (path) {
    case GemmPath::kEmulated:
      return device.major >= 8 ? yes() : not_here("compute capability 8.0 or newer");
    case GemmPath::kDecode:
      if (problem.a == OperandFormat::kRowScaled || problem.b == OperandFormat::kRowScaled) {
        return not_these("BF16 and MXFP8");
      }
      switch (capability) {
        case 80:
        case 86:
        case 87:
        case 89:
        case 90:
        case 100:
        case 103:
        case 120:
        case 121:
          return detail::supports_cublaslt(120000);
        default:
          return not_here("compute capability 8.0 to 9.0, 10.0, 10.3, 12.0 or 12.1");
      }
    case GemmPath::kRowScaled:
      if (!has(OperandFormat::kRowScaled, OperandFormat::kRowScaled)) {
        return not_these("row-scaled FP8 with row-scaled FP8");
      }
      return capability == 90 ? detail::supports_cublaslt(120900)
                              : not_here("compute capability 9.0");
    case GemmPath::kSM90:
      if (!has(OperandFormat::kBFloat16, OperandFormat::kMXFP8)) {
        return not_these("BF16 with MXFP8");
      }
      if (problem.d != DType::kBFloat16) return no("sm90 writes BF16 only");
      return capability == 90 ? detail::supports_sm90() : not_here("compute capability 9.0");
    case GemmPath::kSM100:
      if (!has(OperandFormat::kMXFP8, OperandFormat::kMXFP8)) return not_these("MXFP8 with MXFP8");
      return capability == 100 || capability == 103 ? detail::supports_sm100()
                                                    : not_here("compute capability 10.0 or 10.3");
    case GemmPath::kSM120:
      if (!has(OperandFormat::kMXFP8, OperandFormat::kMXFP8)) return not_these("MXFP8 with MXFP8");
      return capability == 120 || capability == 121 ? detail::supports_sm120()
                                                    : not_here("compute capability 12.0 or 12.1");
  }
  return no("unknown path");
}

// The paths that compute a problem on a device, for a sentence on one that does not.
std::string paths_text(const GemmProblem& problem, int device) {
  std::string names;
  for (const GemmPath path : all_gemm_paths()) {
    if (!supports(path, problem, device)) continue;
    names += names.empty() ? "\"" : " or \"";
    names += name(path) + std::string("\"");
  }
  return operands_text(problem) + " takes " + (names.empty() ? "no path" : names) + " on " +
         (device == kHost ? "the CPU" : detail::find_device(device).name);
}

struct OperandParts {
  detail::GemmOperandTask task;
  std::int64_t rows, cols;
  OperandFormat format;
  detail::MemoryRange data, scales;
};

OperandParts parts_of(const GemmOperand& operand, const char* name) {
  return std::visit(
      [&](const auto& view) -> OperandParts {
        using View = std::decay_t<decltype(view)>;
        if constexpr (std::is_same_v<View, ConstMatrixView>) {
          detail::check_matrix(view, name);
          if (view.dtype != DType::kBFloat16) {
            throw InvalidArgument(std::string(name) + " must be BF16, MXFP8 or row-scaled FP8");
          }
          const std::int64_t row_stride = view.rows > 1 ? view.row_stride : view.cols;
          return {{OperandFormat::kBFloat16, view.data, nullptr, row_stride},
                  view.rows,
                  view.cols,
                  OperandFormat::kBFloat16,
                  detail::range_of(view, name),
                  {nullptr, 0, name}};
        } else {
          const bool mx = std::is_same_v<View, ConstMXFP8View>;
          if (view.rows < 0 || view.cols < 0) {
            throw InvalidArgument(std::string(name) + " has a negative size " +
                                  detail::shape_text(view.rows, view.cols));
          }
          if (view.rows > 0 && view.cols > 0 && (!view.codes || !view.scales)) {
            throw InvalidArgument(std::string("the codes or scales of ") + name +
                                  " are a null pointer");
          }
          const auto format = mx ? OperandFormat::kMXFP8 : OperandFormat::kRowScaled;
          const std::int64_t scale_bytes =
              mx ? MXFP8Shape{view.rows, view.cols}.scale_bytes() : view.rows * 4;
          return {{format, view.codes, view.scales, view.cols},
                  view.rows,
                  view.cols,
                  format,
                  {view.codes, view.rows * view.cols, name},
                  {view.scales, scale_bytes, name}};
        }
      },
      operand);
}

struct Checked {
  GemmProblem problem;
  detail::GemmTask task;
  OperandParts a, b;
  detail::MemoryRange bias, d;
};

Checked check(const GemmArguments& arguments) {
  const OperandParts a = parts_of(arguments.a, "A"), b = parts_of(arguments.b, "B");
  const MatrixView& d = arguments.d;
  detail::check_matrix(d, "D");
  if (a.cols != b.cols) {
    throw InvalidArgument("A is " + detail::shape_text(a.rows, a.cols) + " and B is " +
                          detail::shape_text(b.rows, b.cols) + ": their widths differ");
  }
  if (d.rows != a.rows || d.cols != b.rows) {
    throw InvalidArgument("D is " + detail::shape_text(d.rows, d.cols) + ", and A B^T is " +
                          detail::shape_text(a.rows, b.rows));
  }
  const Checked checked{
      {a.rows, b.rows, a.cols, a.format, b.format, d.dtype, arguments.bias != nullptr},
      {a.rows, b.rows, a.cols, a.task, b.task, arguments.bias, d.data, d.dtype,
       d.rows > 1 ? d.row_stride : d.cols},
      a,
      b,
      {arguments.bias, arguments.bias ? b.rows * 2 : 0, "the bias"},
      detail::range_of(d, "D")};
  check_sizes(checked.problem);
  detail::check_alignment(checked.bias, 2);
  detail::check_disjoint(checked.d, {a.data, a.scales, b.data, b.scales, checked.bias});
  return checked;
}

void check_rows(const detail::MemoryRange& memory, std::int64_t row_stride, std::size_t item) {
  detail::check_alignment(memory, 16);
  // Rows without elements may have any stride: that of torch.zeros(3, 0) is 1.
  if (memory.bytes > 0 && static_cast<std::size_t>(row_stride) * item % 16 != 0) {
    throw InvalidArgument(std::string("the rows of ") + memory.what +
                          " must begin at multiples of 16 bytes");
  }
}

// Whether a BF16 product of all decoded weights takes less time on Hopper than sm90, by
// measurements on an H100 (docs/performance.md). Decoding takes as long for few tokens as for many;
// sm90 has tiles for the whole device from 4,096 tokens on, or from half of that if there are many
// weights.
bool decodes_first(const GemmProblem& problem) {
  const std::int64_t enough_for_sm90 = problem.n > problem.k ? 2048 : 4096;
  return problem.m >= 8192 || (problem.m >= 1024 && problem.m < enough_for_sm90);
}

}  // namespace

const char* name(GemmPath path) {
  switch (path) {
    case GemmPath::kEmulated:
      return "emulated";
    case GemmPath::kDecode:
      return "decode";
    case GemmPath::kRowScaled:
      return "row-scaled";
    case GemmPath::kSM90:
      return "sm90";
    case GemmPath::kSM100:
      return "sm100";
    default:
      return "sm120";
  }
}

std::vector<GemmPath> all_gemm_paths() {
  return {GemmPath::kEmulated, GemmPath::kDecode, GemmPath::kRowScaled,
          GemmPath::kSM90,     GemmPath::kSM100,  GemmPath::kSM120};
}

GemmPath gemm_path(const std::string& path_name) {
  std::string known;
  for (const GemmPath path : all_gemm_paths()) {
    if (path_name == name(path)) return path;
    known += known.empty() ? "" : ", ";
    known += name(path);
  }
  throw InvalidArgument("unknown path \"" + path_name + "\": use one of " + known);
}

Support supports(GemmPath path, const GemmProblem& problem, int device) {
  check_sizes(problem);
  if (device == kHost) {
    return path == GemmPath::kEmulated ? yes()
                                       : no(std::string(name(path)) + " needs a CUDA device");
  }
  return supports_on(path, problem, detail::find_device(device));
}

GemmPath preferred_path(const GemmProblem& problem, int device) {
  check_sizes(problem);
  if (device == kHost) return GemmPath::kEmulated;
  const CudaDevice& found = detail::find_device(device);
  const bool decode_first = decodes_first(problem);
  std::string reasons;
  for (const GemmPath path : {GemmPath::kSM100, GemmPath::kSM120, GemmPath::kRowScaled,
                              decode_first ? GemmPath::kDecode : GemmPath::kSM90,
                              decode_first ? GemmPath::kSM90 : GemmPath::kDecode}) {
    const Support support = supports_on(path, problem, found);
    if (support) return path;
    reasons += "; " + support.reason;
  }
  if (supports_on(GemmPath::kEmulated, problem, found)) {
    reasons += "; \"emulated\" runs there, slowly, when asked for by name";
  }
  throw Unsupported("no fast path for " + operands_text(problem) + " on " + text(found) + reasons);
}

std::size_t workspace_size(GemmPath path, const GemmProblem& problem, int device) {
  const Support support = supports(path, problem, device);
  if (!support) throw Unsupported(support.reason + "; " + paths_text(problem, device));
  if (problem.m == 0 || problem.n == 0 || problem.k == 0) return 0;
  const detail::DeviceGuard guard(device);
  switch (path) {
    case GemmPath::kEmulated:
      return 0;
    case GemmPath::kDecode:
      return detail::workspace_decode(problem);
    case GemmPath::kRowScaled:
      return detail::workspace_row_scaled(problem);
    case GemmPath::kSM90:
      return detail::workspace_sm90(problem);
    case GemmPath::kSM100:
      return detail::workspace_sm100(problem);
    default:
      return detail::workspace_sm120(problem);
  }
}

GemmProblem problem_of(const GemmArguments& arguments) { return check(arguments).problem; }

void gemm(GemmPath path, const GemmArguments& arguments, Workspace workspace, CudaStream stream) {
  const Checked checked = check(arguments);
  const detail::MemoryRange memory{workspace.data, static_cast<std::int64_t>(workspace.bytes),
                                   "the workspace"};
  detail::check_disjoint(memory, {checked.a.data, checked.a.scales, checked.b.data,
                                  checked.b.scales, checked.bias, checked.d});
  detail::check_alignment(memory, 256);
  detail::check_alignment(checked.bias, 16);
  for (const OperandParts* operand : {&checked.a, &checked.b}) {
    const bool bf16 = operand->format == OperandFormat::kBFloat16;
    check_rows(operand->data, operand->task.row_stride, bf16 ? 2 : 1);
    detail::check_alignment(operand->scales, 16);
  }
  check_rows(checked.d, checked.task.d_row_stride, element_size(checked.problem.d));
  detail::check_device_memory({checked.a.data, checked.a.scales, checked.b.data, checked.b.scales,
                               checked.bias, checked.d, memory});
  if (checked.problem.m == 0 || checked.problem.n == 0) return;
  const std::size_t needed = workspace_size(path, checked.problem, detail::current_device());
  if (workspace.bytes < needed) {
    throw InvalidArgument("the workspace has " + std::to_string(workspace.bytes) +
                          " bytes, and the path \"" + name(path) + "\" needs " +
                          std::to_string(needed));
  }
  // Without depth there is nothing to multiply, only the bias; only one path needs to know that.
  switch (checked.problem.k == 0 ? GemmPath::kEmulated : path) {
    case GemmPath::kEmulated:
      return detail::gemm_emulated_cuda(checked.task, stream);
    case GemmPath::kDecode:
      return detail::gemm_decode(checked.task, workspace, stream);
    case GemmPath::kRowScaled:
      return detail::gemm_row_scaled(checked.task, workspace, stream);
    case GemmPath::kSM90:
      return detail::gemm_sm90(checked.task, workspace, stream);
    case GemmPath::kSM100:
      return detail::gemm_sm100(checked.task, workspace, stream);
    case GemmPath::kSM120:
      return detail::gemm_sm120(checked.task, workspace, stream);
  }
}

void gemm(const GemmArguments& arguments, int threads) {
  const Checked checked = check(arguments);
  detail::check_alignment(checked.d, element_size(checked.problem.d));
  const detail::GemmTask& task = checked.task;
  if (task.m == 0) return;
  const detail::Kernels& kernels = detail::active_kernels();
  detail::parallel_for(
      ceil_div(task.n, detail::kGemmPanel), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const auto scratch =
            std::make_unique<float[]>(static_cast<std::size_t>(detail::gemm_scratch(task.k)));
        for (std::int64_t panel = begin; panel < end; ++panel) {
          kernels.gemm_panel(task, panel, scratch.get());
        }
      });
}

}  // namespace zimage_mxfp8
