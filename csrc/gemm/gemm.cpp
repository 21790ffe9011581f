#include "zimage_mxfp8/gemm.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <set>
#include <type_traits>

#include "check.h"
#include "cuda/runtime.h"
#include "gemm/dispatch/dispatch.h"
#include "gemm/epilogues.h"
#include "gemm/reference/reference.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/rotated.h"
#include "zimage_mxfp8/row_scaled.h"

namespace zimage_mxfp8 {
namespace {

using detail::check_rows, detail::MemoryRange;

void check_sizes(const GemmProblem& problem) {
  const std::int64_t most = std::numeric_limits<std::int32_t>::max();
  if (problem.m < 0 || problem.n < 0 || problem.k < 0 || problem.m > most || problem.n > most ||
      problem.k > most) {
    throw InvalidArgument("sizes of a GEMM must be from 0 to 2^31 - 1");
  }
  if (problem.n % 8 != 0) {
    throw InvalidArgument("N must be a multiple of 8, not " + std::to_string(problem.n));
  }
  if (problem.k % kBlockSize != 0) {
    throw InvalidArgument("K must be a multiple of 32, not " + std::to_string(problem.k));
  }
  if (problem.a == OperandFormat::kInt8 && problem.k > kMaxInt8Depth) {
    throw InvalidArgument("K of INT8 must be at most " + std::to_string(kMaxInt8Depth) + ", not " +
                          std::to_string(problem.k));
  }
}

std::string encoding_epilogues() {
  std::string names;
  for (const GemmEpilogue one : gemm_epilogues()) {
    if (!info(one).encodes) continue;
    names += names.empty() ? "" : " and ";
    names += info(one).name;
  }
  return names;
}

std::int64_t columns_of_d(const GemmProblem& problem) {
  return problem.n / info(problem.epilogue).rows_per_column;
}

void check_problem(const GemmProblem& problem) {
  check_sizes(problem);
  if (problem.addend_rank != 0) {
    if (problem.addend_rank < 0 || problem.addend_rank % 8 != 0) {
      throw InvalidArgument("the addend's rank must be a multiple of 8, not " +
                            std::to_string(problem.addend_rank));
    }
    if (problem.bias) throw InvalidArgument("a GEMM with an addend has no bias");
    if (problem.k == 0) throw InvalidArgument("a GEMM with an addend needs a K of 32 or more");
  }
  const EpilogueInfo& epilogue = info(problem.epilogue);
  if (problem.d_format != OperandFormat::kBFloat16 && !epilogue.encodes) {
    throw InvalidArgument("D is only encoded after " + encoding_epilogues());
  }
  if (problem.epilogue == GemmEpilogue::kNone) return;
  if (problem.bias) throw InvalidArgument("a GEMM with an epilogue has no bias");
  if (problem.d != DType::kBFloat16) throw InvalidArgument("D of an epilogue must be BF16");
  const std::int64_t multiple = 8 * epilogue.rows_per_column;
  if (problem.n % multiple != 0) {
    throw InvalidArgument("N must be a multiple of " + std::to_string(multiple) + " with " +
                          epilogue.name + ", not " + std::to_string(problem.n));
  }
}

detail::Where where_of(int device) {
  return device == kHost ? nullptr : &detail::find_device(device);
}

std::string environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? value : "";
}

// The kernel that the environment names, or "".
const std::string& forced_kernel() {
  static const std::string forced = [] {
    std::string asked = environment("ZIMAGE_MXFP8_GEMM_KERNEL");
    if (asked.empty()) return asked;
    try {
      find_gemm_kernel(asked);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(error.what() +
                            std::string(", or unset ZIMAGE_MXFP8_GEMM_KERNEL in the environment"));
    }
    return asked;
  }();
  return forced;
}

// Prints each problem once.
void log(const GemmProblem& problem, detail::Where where) {
  static const bool enabled = [] {
    const std::string value = environment("ZIMAGE_MXFP8_GEMM_LOG");
    return !value.empty() && value != "0";
  }();
  if (!enabled) return;
  const std::string line = detail::log_line(
      problem, where, detail::explain(detail::gemm_table(), problem, where, forced_kernel()));
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (printed.insert(line).second) std::fprintf(stderr, "zimage-mxfp8 gemm: %s\n", line.c_str());
}

// Kernels that compute a problem on a device, for the error about one that does not.
std::string kernels_text(const GemmProblem& problem, detail::Where where) {
  std::string names;
  for (const GemmKernel& kernel : detail::gemm_table()) {
    if (!detail::supports_on(kernel, problem, where)) continue;
    names += names.empty() ? "\"" : " or \"";
    names += std::string(kernel.name) + "\"";
  }
  return detail::problem_text(problem) + " is computed by " +
         (names.empty() ? "no kernel" : names) + " on " + (where ? where->name : "the CPU");
}

void check_support(const GemmKernel& kernel, const GemmProblem& problem, detail::Where where) {
  const Support support = detail::supports_on(kernel, problem, where);
  if (!support) throw Unsupported(support.reason + "; " + kernels_text(problem, where));
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
            throw InvalidArgument(std::string(name) +
                                  " must be BF16, MXFP8, row-scaled FP8 or INT8");
          }
          const std::int64_t row_stride = view.rows > 1 ? view.row_stride : view.cols;
          return {{OperandFormat::kBFloat16, view.data, nullptr, row_stride, view.dtype},
                  view.rows,
                  view.cols,
                  OperandFormat::kBFloat16,
                  detail::range_of(view, name),
                  {nullptr, 0, name}};
        } else {
          constexpr bool mx = std::is_same_v<View, ConstMXFP8View>;
          if (view.rows < 0 || view.cols < 0) {
            throw InvalidArgument(std::string(name) + " has a negative size " +
                                  detail::shape_text(view.rows, view.cols));
          }
          if (view.rows > 0 && view.cols > 0 && (!view.codes || !view.scales)) {
            throw InvalidArgument(std::string("the codes or scales of ") + name +
                                  " are a null pointer");
          }
          const auto format = static_cast<OperandFormat>(operand.index());
          const std::int64_t scale_bytes =
              mx ? MXFP8Shape{view.rows, view.cols}.scale_bytes() : view.rows * 4;
          return {{format, view.codes, view.scales, view.cols, DType::kBFloat16},
                  view.rows,
                  view.cols,
                  format,
                  {view.codes, view.rows * view.cols, name},
                  {view.scales, scale_bytes, name}};
        }
      },
      operand);
}

// D.
struct Outputs {
  MatrixView plain;  // D in BF16 or another dtype; its data is null if D is encoded
  std::int64_t rows, cols;
  OperandFormat format;
  MemoryRange data, scales;
};

Outputs outputs_of(const ActivationView& d) {
  return std::visit(
      [&d](const auto& view) -> Outputs {
        using View = std::decay_t<decltype(view)>;
        if constexpr (std::is_same_v<View, MatrixView>) {
          detail::check_matrix(view, "D");
          return {view,
                  view.rows,
                  view.cols,
                  OperandFormat::kBFloat16,
                  detail::range_of(view, "D"),
                  {nullptr, 0, "D"}};
        } else {
          if (view.rows < 0 || view.cols < 0) {
            throw InvalidArgument("D has a negative size " +
                                  detail::shape_text(view.rows, view.cols));
          }
          if (view.rows > 0 && view.cols > 0 && (!view.codes || !view.scales)) {
            throw InvalidArgument("the codes or scales of D are a null pointer");
          }
          constexpr bool mx = std::is_same_v<View, MXFP8View>;
          const MXFP8Shape shape{view.rows, view.cols};
          return {{nullptr, DType::kBFloat16, view.rows, view.cols, view.cols},
                  view.rows,
                  view.cols,
                  static_cast<OperandFormat>(d.index()),
                  {view.codes, mx ? shape.code_bytes() : view.rows * view.cols, "the codes of D"},
                  {view.scales, mx ? shape.scale_bytes() : view.rows * 4, "the scales of D"}};
        }
      },
      d);
}

// The memory of X and U.
std::vector<MemoryRange> check_addend(const LowRankAddend& addend, std::int64_t m, std::int64_t n) {
  std::vector<MemoryRange> memory;
  const auto check_one = [&](const ConstMatrixView& view, const char* name, std::int64_t rows) {
    detail::check_matrix(view, name);
    if (view.dtype != DType::kBFloat16 || view.rows != rows || view.cols != addend.x.cols ||
        view.cols < 1) {
      throw InvalidArgument(std::string(name) + " must be BF16 " +
                            detail::shape_text(rows, addend.x.cols) + ", not empty");
    }
    memory.push_back(detail::range_of(view, name));
  };
  check_one(addend.x, "the addend's X", m);
  check_one(addend.u, "the addend's U", n);
  return memory;
}

struct Checked {
  GemmProblem problem;
  detail::GemmTask task;
  OperandParts a, b;
  MemoryRange bias;
  Outputs d;
  std::vector<MemoryRange> addend;  // of X and U; empty without one
};

Checked check(const GemmArguments& arguments) {
  const OperandParts a = parts_of(arguments.a, "A"), b = parts_of(arguments.b, "B");
  const Outputs d = outputs_of(arguments.d);
  if (a.cols != b.cols) {
    throw InvalidArgument("A is " + detail::shape_text(a.rows, a.cols) + " and B is " +
                          detail::shape_text(b.rows, b.cols) + ": their widths differ");
  }
  const auto epilogue = static_cast<GemmEpilogue>(arguments.epilogue.index());
  const LowRankAddend* const addend = arguments.addend ? &*arguments.addend : nullptr;
  const Checked checked{
      {a.rows, b.rows, a.cols, a.format, b.format, d.plain.dtype, arguments.bias != nullptr,
       epilogue, d.format, addend ? addend->x.cols : 0},
      {a.rows, b.rows, a.cols, a.task, b.task, arguments.bias, d.plain.data, d.plain.dtype,
       d.rows > 1 ? d.plain.row_stride : d.cols, nullptr, addend},
      a,
      b,
      {arguments.bias, arguments.bias ? b.rows * 2 : 0, "the bias"},
      d,
      addend ? check_addend(*addend, a.rows, b.rows) : std::vector<MemoryRange>{}};
  check_problem(checked.problem);
  const std::int64_t columns = columns_of_d(checked.problem);
  if (d.rows != a.rows || d.cols != columns) {
    throw InvalidArgument("D is " + detail::shape_text(d.rows, d.cols) + ", and the result is " +
                          detail::shape_text(a.rows, columns));
  }
  detail::check_alignment(checked.bias, 2);
  for (const MemoryRange& written : {d.data, d.scales}) {
    detail::check_disjoint(written, {a.data, a.scales, b.data, b.scales, checked.bias});
  }
  return checked;
}

// How a kernel computes a problem: the workspace begins with the data between its launches.
struct Steps {
  bool fused;            // the kernel applies the epilogue
  std::int64_t between;  // columns of BF16 [M, between] that are kept in the workspace; 0: none
  std::size_t between_bytes;    // of these columns
  std::size_t workspace_bytes;  // of all launches
};

std::size_t kernel_workspace(const GemmKernel& kernel, const GemmProblem& problem) {
  if (problem.k == 0 || !kernel.implementation->workspace) return 0;
  return kernel.implementation->workspace(problem);
}

// Columns of BF16 between the launches of a problem: of what the kernel writes, unless that is D.
std::int64_t columns_between(const GemmProblem& problem, bool fused) {
  const std::int64_t written = fused ? columns_of_d(problem) : problem.n;
  const bool is_d =
      problem.d_format == OperandFormat::kBFloat16 && written == columns_of_d(problem);
  return is_d ? 0 : written;
}

// The steps of a problem of positive M and N. Throws Unsupported if the kernel does not support it.
Steps steps_of(const GemmKernel& kernel, const GemmProblem& problem, int device) {
  const detail::Where where = &detail::find_device(device);
  check_support(kernel, problem, where);
  // Without depth there is nothing to multiply, and no fused kernel needs to know that.
  const bool fused = problem.epilogue == GemmEpilogue::kNone ||
                     (problem.k > 0 && detail::fuses_epilogue(kernel, problem, where));
  const std::int64_t between = columns_between(problem, fused);
  const auto between_bytes = static_cast<std::size_t>(round_up(problem.m * between * 2, 256));
  const detail::DeviceGuard guard(device);
  const std::size_t of_kernel =
      kernel_workspace(kernel, fused ? problem : detail::without_epilogue(problem));
  return {fused, between, between_bytes, between_bytes + of_kernel};
}

bool is_empty(const GemmProblem& problem) { return problem.m == 0 || problem.n == 0; }

void encode(const ConstMatrixView& matrix, const ActivationView& target, CudaStream stream) {
  if (const auto* mxfp8 = std::get_if<MXFP8View>(&target)) return quantize(matrix, *mxfp8, stream);
  if (const auto* int8 = std::get_if<Int8View>(&target)) {
    return quantize_rotated(matrix, *int8, stream);
  }
  quantize_rows(matrix, std::get<RowScaledView>(target), stream);
}

}  // namespace

const char* name(const GemmKernel& kernel) { return kernel.name; }

std::vector<const GemmKernel*> gemm_kernels() {
  std::vector<const GemmKernel*> kernels;
  for (const GemmKernel& kernel : detail::gemm_table()) kernels.push_back(&kernel);
  return kernels;
}

const GemmKernel& find_gemm_kernel(const std::string& kernel_name) {
  std::string known;
  for (const GemmKernel& kernel : detail::gemm_table()) {
    if (kernel_name == kernel.name) return kernel;
    known += known.empty() ? "" : ", ";
    known += kernel.name;
  }
  throw InvalidArgument("unknown GEMM kernel \"" + kernel_name + "\": use one of " + known);
}

std::vector<std::pair<OperandFormat, OperandFormat>> operand_formats(const GemmKernel& kernel) {
  std::vector<std::pair<OperandFormat, OperandFormat>> pairs;
  for (const OperandFormat a : kOperandFormats) {
    for (const OperandFormat b : kOperandFormats) {
      if (kernel.operands & detail::operands(a, b)) pairs.emplace_back(a, b);
    }
  }
  return pairs;
}

std::vector<GemmEpilogue> epilogues(const GemmKernel& kernel) {
  std::vector<GemmEpilogue> found;
  for (const GemmEpilogue one : gemm_epilogues()) {
    if (kernel.epilogues & detail::epilogue(one)) found.push_back(one);
  }
  return found;
}

Support supports(const GemmKernel& kernel, const GemmProblem& problem, int device) {
  check_problem(problem);
  return detail::supports_on(kernel, problem, where_of(device));
}

std::vector<GemmCandidate> explain_gemm(const GemmProblem& problem, int device) {
  check_problem(problem);
  return detail::explain(detail::gemm_table(), problem, where_of(device), forced_kernel());
}

const GemmKernel& choose_gemm(const GemmProblem& problem, int device) {
  check_problem(problem);
  const detail::Where where = where_of(device);
  log(problem, where);
  return detail::choose(detail::gemm_table(), problem, where, forced_kernel());
}

std::size_t workspace_size(const GemmKernel& kernel, const GemmProblem& problem, int device) {
  check_problem(problem);
  if (!is_empty(problem) && device != kHost) {
    return steps_of(kernel, problem, device).workspace_bytes;
  }
  check_support(kernel, problem, where_of(device));
  return 0;
}

GemmProblem problem_of(const GemmArguments& arguments) { return check(arguments).problem; }

void gemm(const GemmKernel& kernel, const GemmArguments& arguments, Workspace workspace,
          CudaStream stream) {
  const Checked checked = check(arguments);
  const GemmProblem& problem = checked.problem;
  const MemoryRange memory{workspace.data, static_cast<std::int64_t>(workspace.bytes),
                           "the workspace"};
  const detail::EpilogueRow& epilogue = detail::epilogue_row(problem.epilogue);
  // What is read apart from the operands.
  std::vector<MemoryRange> others = epilogue.check(arguments.epilogue, problem);
  if (arguments.addend) {
    check_rows(checked.addend[0], arguments.addend->x.row_stride, 2);
    check_rows(checked.addend[1], arguments.addend->u.row_stride, 2);
    others.insert(others.end(), checked.addend.begin(), checked.addend.end());
  }
  detail::check_disjoint(
      memory, {checked.a.data, checked.a.scales, checked.b.data, checked.b.scales, checked.bias,
               checked.d.data, checked.d.scales});
  for (const MemoryRange& read : others) {
    for (const MemoryRange& written : {memory, checked.d.data, checked.d.scales}) {
      detail::check_disjoint(written, {read});
    }
  }
  detail::check_alignment(memory, 256);
  detail::check_alignment(checked.bias, 16);
  for (const OperandParts* operand : {&checked.a, &checked.b}) {
    const bool bf16 = operand->format == OperandFormat::kBFloat16;
    check_rows(operand->data, operand->task.row_stride, bf16 ? 2 : 1);
    detail::check_alignment(operand->scales, 16);
  }
  if (checked.d.format == OperandFormat::kBFloat16) {
    check_rows(checked.d.data, checked.task.d_row_stride, element_size(problem.d));
  }
  detail::check_device_memory({checked.a.data, checked.a.scales, checked.b.data, checked.b.scales,
                               checked.bias, checked.d.data, checked.d.scales, memory});
  for (const MemoryRange& read : others) detail::check_device_memory({read});
  if (is_empty(problem)) return;
  const Steps steps = steps_of(kernel, problem, detail::current_device());
  if (workspace.bytes < steps.workspace_bytes) {
    throw InvalidArgument("the workspace has " + std::to_string(workspace.bytes) +
                          " bytes, and the kernel \"" + kernel.name + "\" needs " +
                          std::to_string(steps.workspace_bytes));
  }
  detail::GemmTask task = checked.task;
  auto* const rest = static_cast<char*>(workspace.data) + steps.between_bytes;
  if (steps.between > 0) {
    task.d = workspace.data;
    task.d_dtype = DType::kBFloat16;
    task.d_row_stride = steps.between;
  }
  if (steps.fused && problem.epilogue != GemmEpilogue::kNone) task.arguments = &arguments;
  // With K = 0 only the bias is left, which the reference handles.
  const detail::GemmImplementation& run =
      problem.k == 0 ? detail::kReference : *kernel.implementation;
  run.run(task, {rest, workspace.bytes - steps.between_bytes}, stream);

  const MatrixView between{task.d, DType::kBFloat16, problem.m, steps.between, steps.between};
  if (!steps.fused) {
    epilogue.launch(steps.between > 0 ? between : checked.d.plain, arguments, stream);
  } else if (steps.between > 0) {
    encode({task.d, DType::kBFloat16, problem.m, steps.between, steps.between}, arguments.d,
           stream);
  }
}

void gemm(const GemmArguments& arguments, int threads) {
  const Checked checked = check(arguments);
  if (checked.problem.epilogue != GemmEpilogue::kNone || checked.problem.addend_rank > 0) {
    throw Unsupported("GEMMs with an epilogue or an addend need a CUDA device");
  }
  detail::check_alignment(checked.d.data, element_size(checked.problem.d));
  detail::reference_gemm(checked.task, threads);
}

}  // namespace zimage_mxfp8
