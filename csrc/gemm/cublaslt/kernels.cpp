// The kernels dequantize and fp8_rowwise, which end in a GEMM of cuBLASLt.
#include <limits>

#include "dequantize/dequantize_cuda.h"
#include "gemm/cublaslt/cublaslt.h"
#include "gemm/dispatch/table.h"
#include "gemm/finish.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

std::string cublaslt_version() { return detail::cublaslt::version(); }

namespace detail {
namespace {

// WorkspaceLayout of a workspace, each aligned for every use. Without one only the size counts.
class WorkspaceLayout {
 public:
  WorkspaceLayout() = default;
  explicit WorkspaceLayout(Workspace workspace)
      : base_(static_cast<char*>(workspace.data)), limit_(workspace.bytes) {}

  void* take(std::int64_t bytes) {
    void* part = base_ ? base_ + used_ : nullptr;
    used_ += static_cast<std::size_t>(round_up(bytes, 256));
    if (used_ > limit_) {  // workspace_size() assumed that D has no gaps between its rows
      throw Unsupported("cuBLASLt has no algorithm for a D with this row stride");
    }
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_ = nullptr;
  std::size_t limit_ = std::numeric_limits<std::size_t>::max();
  std::size_t used_ = 0;
};

// The last step of both kernels: the GEMM, and the operations that cuBLASLt lacks.
//
// cuBLASLt adds a bias if D is BF16 and it has an algorithm for that. Otherwise it writes float32
// sums, to D itself or, if D is narrower, to the workspace; then the bias is added and the sum
// rounded.
class Epilogue {
 public:
  // Completes `gemm`, which has the operands, and takes parts of the workspace.
  Epilogue(const GemmTask& task, cublaslt::Gemm& gemm, WorkspaceLayout& parts) : task_(task) {
    library_ = parts.take(static_cast<std::int64_t>(cublaslt::kWorkspaceBytes));
    gemm.m = static_cast<int>(task.m);
    gemm.n = static_cast<int>(task.n);
    gemm.k = static_cast<int>(task.k);
    gemm.bias = task.bias;
    gemm.d = task.d;
    gemm.d_dtype = task.d_dtype;
    gemm.d_row_stride = task.d_row_stride;
    fused_ = task.d_dtype == DType::kBFloat16 && cublaslt::has_algorithm(gemm);
    if (fused_) return;
    gemm.bias = nullptr;
    gemm.d_dtype = DType::kFloat32;
    if (task.d_dtype != DType::kFloat32) {
      gemm.d = parts.take(task.m * task.n * 4);
      gemm.d_row_stride = task.n;
    }
  }

  void run(const cublaslt::Gemm& gemm, CudaStream stream) const {
    cublaslt::multiply(gemm, library_, stream);
    if (!fused_ && (gemm.d != task_.d || task_.bias)) {
      gemm_finish(static_cast<const float*>(gemm.d), gemm.d_row_stride, task_, stream);
    }
  }

 private:
  const GemmTask& task_;
  void* library_;
  bool fused_;
};

// A task of a problem's sizes with pointers that must not be followed.
GemmTask task_of(const GemmProblem& problem) {
  alignas(256) static char somewhere[256];
  GemmTask task{};
  task.m = problem.m;
  task.n = problem.n;
  task.k = problem.k;
  task.a = {problem.a, somewhere, somewhere, problem.k};
  task.b = {problem.b, somewhere, somewhere, problem.k};
  task.bias = problem.bias ? somewhere : nullptr;
  task.d = somewhere;
  task.d_dtype = problem.d;
  task.d_row_stride = problem.n;
  return task;
}

cublaslt::Gemm row_scaled_gemm(const GemmTask& task) {
  cublaslt::Gemm gemm{};
  gemm.fp8 = true;
  gemm.a = task.a.codes;
  gemm.b = task.b.codes;
  gemm.a_scales = task.a.scales;
  gemm.b_scales = task.b.scales;
  gemm.a_row_stride = task.a.row_stride;
  gemm.b_row_stride = task.b.row_stride;
  return gemm;
}

// An operand in BF16: itself, or the part of the workspace that it will be decoded to.
const void* decoded(const GemmOperandTask& operand, std::int64_t rows, std::int64_t k,
                    WorkspaceLayout& parts, std::int64_t& row_stride) {
  if (operand.format == OperandFormat::kBFloat16) {
    row_stride = operand.row_stride;
    return operand.codes;
  }
  row_stride = k;
  return parts.take(rows * k * 2);
}

cublaslt::Gemm decoded_gemm(const GemmTask& task, WorkspaceLayout& parts) {
  cublaslt::Gemm gemm{};
  gemm.a = decoded(task.a, task.m, task.k, parts, gemm.a_row_stride);
  gemm.b = decoded(task.b, task.n, task.k, parts, gemm.b_row_stride);
  return gemm;
}

void decode(const GemmOperandTask& operand, std::int64_t rows, std::int64_t k, const void* target,
            CudaStream stream) {
  if (operand.format == OperandFormat::kBFloat16) return;
  dequantize_cuda({static_cast<const std::uint8_t*>(operand.codes),
                   static_cast<const std::uint8_t*>(operand.scales), rows, k,
                   const_cast<void*>(target), DType::kBFloat16, k},
                  stream);
}

// In version `minimum` (120900 is 12.9.0) or newer.
template <std::size_t minimum>
Support available() {
  const std::string reason = cublaslt::unavailable(minimum);
  return {reason.empty(), reason};
}

std::size_t dequantize_workspace(const GemmProblem& problem) {
  const GemmTask task = task_of(problem);
  WorkspaceLayout parts;
  cublaslt::Gemm gemm = decoded_gemm(task, parts);
  const Epilogue epilogue(task, gemm, parts);
  return parts.used();
}

void run_dequantize(const GemmTask& task, Workspace workspace, CudaStream stream) {
  WorkspaceLayout parts(workspace);
  cublaslt::Gemm gemm = decoded_gemm(task, parts);
  const Epilogue epilogue(task, gemm, parts);
  decode(task.a, task.m, task.k, gemm.a, stream);
  decode(task.b, task.n, task.k, gemm.b, stream);
  epilogue.run(gemm, stream);
}

std::size_t fp8_rowwise_workspace(const GemmProblem& problem) {
  const GemmTask task = task_of(problem);
  WorkspaceLayout parts;
  cublaslt::Gemm gemm = row_scaled_gemm(task);
  const Epilogue epilogue(task, gemm, parts);
  return parts.used();
}

void run_fp8_rowwise(const GemmTask& task, Workspace workspace, CudaStream stream) {
  WorkspaceLayout parts(workspace);
  cublaslt::Gemm gemm = row_scaled_gemm(task);
  Epilogue(task, gemm, parts).run(gemm, stream);
}

}  // namespace

const GemmImplementation kDequantize{available<120000>, dequantize_workspace, run_dequantize};
const GemmImplementation kFP8Rowwise{available<120900>, fp8_rowwise_workspace, run_fp8_rowwise};

}  // namespace detail
}  // namespace zimage_mxfp8
