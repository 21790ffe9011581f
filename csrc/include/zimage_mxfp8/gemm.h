// Matrix products with 8-bit operands: D[M, N] = A[M, K] B[N, K]^T + bias[N].
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

enum class OperandFormat : std::uint8_t { kBFloat16, kMXFP8, kRowScaled };

// What a product is, apart from its numbers. M is any size, N a multiple of 8, K one of 32.
struct GemmProblem {
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  OperandFormat a;
  OperandFormat b;
  DType d;
  bool bias;
};

// How a product is computed. All accumulate in float32.
enum class GemmPath : std::uint8_t {
  // Decoded operands, products added in order of K. Runs on the CPU and on CUDA devices of
  // compute capability 8.0 and newer with the same result; slow. The reference for all others.
  kEmulated,
  // Operands decoded to BF16 (exact for scale bytes of 3 and more) in the workspace, then
  // cuBLASLt's BF16 product. Compute capability 8.0 to 9.0, 10.x, 12.x.
  kDecode,
  // Row-scaled operands, cuBLASLt's FP8 product with row and column scales and fast accumulation.
  // Compute capability 9.0.
  kRowScaled,
  // BF16 activations and MXFP8 weights, which are decoded to BF16 (exact for scale bytes of 3 and
  // more) on their way to the tensor cores. A block with scale 255 is NaN, but codes 0x7F and 0xFF
  // under another scale, which no encoder writes, count as 480. D in BF16. Compute capability 9.0.
  kSM90,
  // MXFP8 operands on Blackwell's block-scaled tensor cores, through CUTLASS. Compute capability
  // 10.0 and 10.3. Compiled and checked, but never run on such a device.
  kSM100,
  // The same for 12.0 and 12.1. Compiled and checked, but never run on such a device.
  kSM120,
};

// "emulated", "decode", "row-scaled", "sm90", "sm100" or "sm120".
const char* name(GemmPath path);
// Throws InvalidArgument for another name.
GemmPath gemm_path(const std::string& path_name);
std::vector<GemmPath> all_gemm_paths();

// Version of the cuBLASLt that kDecode and kRowScaled use, such as "13.1.0"; empty if there is
// none. It is loaded when it is first needed: the process's own if it has one, else by its name.
std::string cublaslt_version();

// The CPU, in place of a device index.
inline constexpr int kHost = -1;

// Whether a path computes a problem on a device, and if not, why.
struct Support {
  bool ok;
  std::string reason;  // empty if ok
  explicit operator bool() const { return ok; }
};

// `device` is the index of a CUDA device, or kHost. Throws InvalidArgument for sizes that no path
// takes, and Unsupported for a device that is not there.
Support supports(GemmPath path, const GemmProblem& problem, int device);

// The fastest path that is not kEmulated; on the CPU kEmulated. Throws Unsupported if there is
// none, naming the device and what would run there.
GemmPath preferred_path(const GemmProblem& problem, int device);

// Bytes of workspace that gemm() needs. Throws Unsupported if the path does not support the
// problem, naming those that do.
std::size_t workspace_size(GemmPath path, const GemmProblem& problem, int device);

// BF16 elements, MXFP8 codes and blocked scales, or row-scaled codes. K is the matrix's width.
using GemmOperand = std::variant<ConstMatrixView, ConstMXFP8View, ConstRowScaledView>;

struct GemmArguments {
  GemmOperand a;     // [M, K]
  GemmOperand b;     // [N, K]
  const void* bias;  // [N] BF16, or null
  MatrixView d;      // [M, N]
};

struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// The problem that arguments state. Throws InvalidArgument if their shapes disagree.
GemmProblem problem_of(const GemmArguments& arguments);

// Computes a product on the current CUDA device (see CudaStream in device.h). All memory is aligned
// to 16 bytes, as are the rows of D and of BF16 operands; the workspace to 256. It has at least
// workspace_size() bytes, belongs to the call until its work on the stream is done, and may have
// any content. Scales of padding are not 255 (quantize() makes them 0). Compute a product of the
// kind once before a graph is captured, so that what it needs is loaded.
//
// Throws InvalidArgument for arguments that break these rules or overlap, Unsupported if the path
// does not support the problem.
void gemm(GemmPath path, const GemmArguments& arguments, Workspace workspace, CudaStream stream);

// kEmulated in host memory, on `threads` threads (0: one a core). Bias and matrices need only the
// alignment of their elements.
void gemm(const GemmArguments& arguments, int threads = 0);

}  // namespace zimage_mxfp8
