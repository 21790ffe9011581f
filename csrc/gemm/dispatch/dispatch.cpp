#include "gemm/dispatch/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

const char* text(OperandFormat format) {
  switch (format) {
    case OperandFormat::kBFloat16:
      return "BF16";
    case OperandFormat::kMXFP8:
      return "MXFP8";
    case OperandFormat::kRowScaled:
      return "row-scaled FP8";
    case OperandFormat::kInt8:
      return "INT8";
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

std::string operands_text(const GemmKernel& kernel) {
  std::vector<std::string> pairs;
  for (const auto& [a, b] : operand_formats(kernel)) {
    pairs.push_back(std::string(text(a)) + " x " + text(b));
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

// Why a kernel does not compute a problem. It becomes a sentence only for errors and lists, because
// a kernel is chosen for each call.
enum class Refusal { kNo, kCpu, kOperands, kEpilogue, kBias, kOutput, kCapability, kUnavailable };

Refusal refusal(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  if (!where && !kernel.on_cpu) return Refusal::kCpu;
  if (!(kernel.operands & operands(problem.a, problem.b))) return Refusal::kOperands;
  const std::uint32_t fused = problem.addend_rank > 0 ? kernel.addend_epilogues : kernel.epilogues;
  if (!(fused & epilogue(problem.epilogue))) return Refusal::kEpilogue;
  if (problem.bias && !kernel.bias) return Refusal::kBias;
  if (!(kernel.outputs & output(problem.d))) return Refusal::kOutput;
  if (!where) return Refusal::kNo;
  if (!has_capability(kernel, *where)) return Refusal::kCapability;
  const auto available = kernel.implementation->available;
  return available && !available() ? Refusal::kUnavailable : Refusal::kNo;
}

bool computes(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  return refusal(kernel, problem, where) == Refusal::kNo;
}

// Whether a kernel computes a problem if the epilogue is a launch of its own.
bool computes_apart(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  return problem.epilogue != GemmEpilogue::kNone && where &&
         computes(kernel, without_epilogue(problem), where);
}

// The cost of a kernel that computes a problem, fused or apart.
double cost(const GemmKernel& kernel, const GemmProblem& problem, Where where, bool fuses) {
  // On the CPU there is one kernel, and nothing to compare.
  return where ? kernel.cost(fuses ? problem : without_epilogue(problem), *where) : 1;
}

}  // namespace

std::string problem_text(const GemmProblem& problem) {
  std::string result = std::to_string(problem.m) + "x" + std::to_string(problem.n) + "x" +
                       std::to_string(problem.k) + " " + operands_text(problem) + " -> ";
  if (problem.epilogue == GemmEpilogue::kNone) {
    result += std::string(text(problem.d)) + (problem.bias ? " with bias" : "");
  } else {
    result += std::string(info(problem.epilogue).name) + " in " + text(problem.d_format);
  }
  if (problem.addend_rank == 0) return result;
  return result + " with an addend of rank " + std::to_string(problem.addend_rank);
}

std::string where_text(Where where) {
  if (!where) return "the CPU";
  return where->name + " (compute capability " + version(where->major * 10 + where->minor) + ")";
}

GemmProblem without_epilogue(const GemmProblem& problem) {
  GemmProblem plain = problem;
  plain.epilogue = GemmEpilogue::kNone;
  plain.d = DType::kBFloat16;
  plain.d_format = OperandFormat::kBFloat16;
  return plain;
}

bool fuses_epilogue(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  return problem.epilogue == GemmEpilogue::kNone || computes(kernel, problem, where);
}

Support supports_on(const GemmKernel& kernel, const GemmProblem& problem, Where where) {
  const Refusal why = refusal(kernel, problem, where);
  if (why == Refusal::kNo || computes_apart(kernel, problem, where)) return {true, ""};
  if (!where && problem.epilogue != GemmEpilogue::kNone) {
    return no("GEMMs with an epilogue need a CUDA device");
  }
  const std::string name = kernel.name;
  switch (why) {
    case Refusal::kNo:
      break;
    case Refusal::kCpu:
      return no(name + " needs a CUDA device");
    case Refusal::kOperands:
      return no(name + " multiplies " + operands_text(kernel) + ", not " + operands_text(problem));
    case Refusal::kEpilogue:
      if (problem.addend_rank > 0) return no(name + " adds no low-rank addend");
      return no(problem.epilogue == GemmEpilogue::kNone
                    ? name + " computes GEMMs with an epilogue or an addend only"
                    : name + " does not fuse " + info(problem.epilogue).name);
    case Refusal::kBias:
      return no(name + " adds no bias");
    case Refusal::kOutput:
      return no(name + " does not write " + text(problem.d));
    case Refusal::kCapability:
      return no(name + " needs compute capability " + capabilities_text(kernel) + ", and this is " +
                where_text(where));
    case Refusal::kUnavailable:
      return kernel.implementation->available();
  }
  return {true, ""};
}

std::vector<GemmCandidate> explain(GemmTable table, const GemmProblem& problem, Where where,
                                   const std::string& forced) {
  std::vector<GemmCandidate> candidates;
  for (const GemmKernel& kernel : table) {
    const Support support = supports_on(kernel, problem, where);
    const bool fuses = support.ok && fuses_epilogue(kernel, problem, where);
    const double estimate = support ? cost(kernel, problem, where, fuses) : kNever;
    candidates.push_back({&kernel, fuses, estimate, support.reason});
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
      one.reason = name + " is not the choice of ZIMAGE_MXFP8_GEMM_KERNEL";
    } else if (one.cost == kNever) {
      one.reason = name + " runs there, slowly, if chosen by name";
    } else {
      one.reason = name + " has cost " + cost_text(one.cost) + ", " + first.kernel->name + " " +
                   cost_text(first.cost);
    }
  }
  return candidates;
}

const GemmKernel& choose(GemmTable table, const GemmProblem& problem, Where where,
                         const std::string& forced) {
  const GemmKernel* chosen = nullptr;
  double least = kNever;
  for (const GemmKernel& kernel : table) {
    const bool fuses = computes(kernel, problem, where);
    if (!fuses && !computes_apart(kernel, problem, where)) continue;
    if (forced == kernel.name) return kernel;
    const double estimate = cost(kernel, problem, where, fuses);
    if (estimate < least) {
      chosen = &kernel;
      least = estimate;
    }
  }
  if (chosen) return *chosen;
  if (std::none_of(table.begin(), table.end(), [&](const GemmKernel& kernel) {
        return kernel.operands & operands(problem.a, problem.b);
      })) {
    throw Unsupported("no kernel multiplies " + operands_text(problem) +
                      "; encode both operands in one format");
  }
  std::string reasons;
  for (const GemmCandidate& one : explain(table, problem, where, forced)) {
    reasons += "; " + one.reason;
  }
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
