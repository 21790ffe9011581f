#include "gemm/dispatch/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr OperandFormat kFormats[] = {OperandFormat::kBFloat16, OperandFormat::kMXFP8,
                                      OperandFormat::kRowScaled};
constexpr double kNever = std::numeric_limits<double>::infinity();

const char* text(OperandFormat format) {
  switch (format) {
    case OperandFormat::kBFloat16:
      return "BF16";
    case OperandFormat::kMXFP8:
      return "MXFP8";
    case OperandFormat::kRowScaled:
      return "row-scaled FP8";
  }
  return "";
}

const char* text(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "BF16";
    case DType::kFloat16:
      return "F16";
    case DType::kFloat32:
      return "F32";
  }
  return "";
}

const char* text(GemmEpilogue epilogue) {
  switch (epilogue) {
    case GemmEpilogue::kNone:
      return "no epilogue";
    case GemmEpilogue::kSiluMultiply:
      return "silu_multiply";
    case GemmEpilogue::kRotateHeads:
      return "rotate_heads";
  }
  return "";
}

// "a", "a or b", "a, b or c".
std::string joined(const std::vector<std::string>& words) {
  std::string result;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i > 0) result += i + 1 == words.size() ? " or " : ", ";
    result += words[i];
  }
  return result;
}

std::string version(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

std::string operands_text(const GemmProblem& problem) {
  return std::string(text(problem.a)) + " x " + text(problem.b);
}

// The pairs that a kernel multiplies, one format of A after another.
std::string operands_text(const GemmKernel& kernel) {
  std::vector<std::string> pairs;
  for (const OperandFormat a : kFormats) {
    for (const OperandFormat b : kFormats) {
      if (kernel.operands & operands(a, b)) {
        pairs.push_back(std::string(text(a)) + " x " + text(b));
      }
    }
  }
  return joined(pairs);
}

std::string capabilities_text(const GemmKernel& kernel) {
  std::vector<std::string> words;
  for (const int capability : kernel.capabilities) {
    if (capability == 0) break;
    words.push_back(version(std::abs(capability)) + (capability < 0 ? " or newer" : ""));
  }
  return joined(words);
}

bool has_capability(const GemmKernel& kernel, const CudaDevice& device) {
  const int found = device.major * 10 + device.minor;
  for (const int capability : kernel.capabilities) {
    if (capability == 0) break;
    if (capability == found || (capability < 0 && found >= -capability)) return true;
  }
  return false;
}

Support no(std::string reason) { return {false, std::move(reason)}; }

std::string cost_text(double cost) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.2f", cost);
  return digits;
}

// Kernels that support a problem, for a sentence on one that does not.
bool is_separate(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  return problem.epilogue != GemmEpilogue::kNone && where &&
         supports_exactly(kernel, without_epilogue(problem), where);
}

}  // namespace

std::string problem_text(const GemmProblem& problem) {
  std::string result = std::to_string(problem.m) + "x" + std::to_string(problem.n) + "x" +
                       std::to_string(problem.k) + " " + operands_text(problem) + " -> ";
  if (problem.epilogue == GemmEpilogue::kNone) {
    return result + text(problem.d) + (problem.bias ? " with bias" : "");
  }
  return result + text(problem.epilogue) + " in " + text(problem.d_format);
}

std::string where_text(Where where) {
  if (!where) return "the CPU";
  return where->name + " (compute capability " + std::to_string(where->major) + "." +
         std::to_string(where->minor) + ")";
}

GemmProblem without_epilogue(const GemmProblem& problem) {
  GemmProblem plain = problem;
  plain.epilogue = GemmEpilogue::kNone;
  plain.d = DType::kBFloat16;
  plain.d_format = OperandFormat::kBFloat16;
  return plain;
}

Support supports_exactly(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  const std::string name = kernel.name;
  if (!where && !kernel.on_cpu) return no(name + " needs a CUDA device");
  if (!(kernel.operands & operands(problem.a, problem.b))) {
    return no(name + " multiplies " + operands_text(kernel) + ", not " + operands_text(problem));
  }
  if (!(kernel.epilogues & epilogue(problem.epilogue))) {
    return no(problem.epilogue == GemmEpilogue::kNone
                  ? name + " computes GEMMs with an epilogue only"
                  : name + " does not fuse " + text(problem.epilogue));
  }
  if (!(kernel.outputs & output(problem.d))) {
    return no(name + " does not write " + text(problem.d));
  }
  if (where && !has_capability(kernel, *where)) {
    return no(name + " needs compute capability " + capabilities_text(kernel) + ", and this is " +
              where_text(where));
  }
  if (where && kernel.implementation->available) return kernel.implementation->available();
  return {true, ""};
}

bool fuses_epilogue(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  return problem.epilogue == GemmEpilogue::kNone || supports_exactly(kernel, problem, where).ok;
}

Support supports_on(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  Support support = supports_exactly(kernel, problem, where);
  if (!support && is_separate(kernel, problem, where)) return {true, ""};
  if (!support && !where && problem.epilogue != GemmEpilogue::kNone) {
    return no("GEMMs with an epilogue need a CUDA device");
  }
  return support;
}

std::vector<GemmCandidate> explain(GemmTable table, const GemmProblem& problem, Where where,
                                   const std::string& forced) {
  std::vector<GemmCandidate> candidates;
  for (const GemmKernel& kernel : table) {
    const Support support = supports_on(kernel, problem, where);
    const bool fuses = support.ok && fuses_epilogue(kernel, problem, where);
    const GemmProblem& computed = fuses ? problem : without_epilogue(problem);
    // On the CPU there is one kernel, and nothing to compare.
    const double cost = !support ? kNever : where ? kernel.cost(computed, *where) : 1;
    candidates.push_back({&kernel, fuses, cost, support.reason});
  }
  const bool is_forced = std::any_of(candidates.begin(), candidates.end(), [&](const auto& one) {
    return one.kernel->name == forced && one.reason.empty();
  });
  const auto rank = [&](const GemmCandidate& one) {
    return is_forced && one.kernel->name == forced ? -kNever : one.cost;
  };
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const auto& one, const auto& other) { return rank(one) < rank(other); });
  const GemmCandidate& first = candidates.front();
  const bool is_chosen = first.reason.empty() && (is_forced || first.cost < kNever);
  for (GemmCandidate& one : candidates) {
    if (!one.reason.empty() || (is_chosen && &one == &first)) continue;
    const std::string name = one.kernel->name;
    if (is_forced) {
      one.reason = name + " was not asked for by ZIMAGE_MXFP8_GEMM_KERNEL";
    } else if (one.cost == kNever) {
      one.reason = name + " runs there, slowly, when asked for by name";
    } else {
      one.reason = name + " has cost " + cost_text(one.cost) + ", " + first.kernel->name + " " +
                   cost_text(first.cost);
    }
  }
  return candidates;
}

const GemmKernel& choose(GemmTable table, const GemmProblem& problem, Where where,
                         const std::string& forced) {
  const std::vector<GemmCandidate> candidates = explain(table, problem, where, forced);
  if (candidates.front().reason.empty()) return *candidates.front().kernel;
  std::string reasons;
  for (const GemmCandidate& one : candidates) reasons += "; " + one.reason;
  throw Unsupported("no fast kernel for " + operands_text(problem) + " on " + where_text(where) +
                    reasons);
}

std::string log_line(const GemmProblem& problem, Where where,
                     const std::vector<GemmCandidate>& candidates) {
  const GemmCandidate& first = candidates.front();
  std::string line = problem_text(problem) + " on " + where_text(where) + ": ";
  if (!first.reason.empty()) {
    line += "no kernel";
  } else {
    line += std::string(first.kernel->name) + " (cost " + cost_text(first.cost) +
            (first.fuses_epilogue ? ")" : ", the epilogue is a launch of its own)");
  }
  for (const GemmCandidate& one : candidates) {
    if (!one.reason.empty()) line += "; " + one.reason;
  }
  return line;
}

}  // namespace zimage_mxfp8::detail
