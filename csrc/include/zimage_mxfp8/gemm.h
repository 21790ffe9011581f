// GEMM with 8-bit operands: D[M, N] = epilogue(A[M, K] B[N, K]^T + bias[N]), or with a low-rank
// addend in place of the bias.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/fused.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

enum class OperandFormat : std::uint8_t { kBFloat16, kMXFP8, kRowScaled, kInt8 };

// All operand formats.
inline constexpr OperandFormat kOperandFormats[] = {OperandFormat::kBFloat16, OperandFormat::kMXFP8,
                                                    OperandFormat::kRowScaled,
                                                    OperandFormat::kInt8};

// The largest K of INT8 operands, whose sums are int32.
inline constexpr std::int64_t kMaxInt8Depth = 131040;

// The operation on the sums, see fused.h: silu_multiply() of the upper and the lower half of B's
// rows, or rotate_heads().
enum class GemmEpilogue : std::uint8_t { kNone, kSiluMultiply, kRotateHeads };

// Facts about an epilogue.
struct EpilogueInfo {
  const char* name;              // such as "silu_multiply"; "none" for kNone
  std::int64_t rows_per_column;  // rows of B for each column of D
  bool encodes;                  // whether D may be encoded
};

// All epilogues, kNone first.
std::vector<GemmEpilogue> gemm_epilogues();
const EpilogueInfo& info(GemmEpilogue epilogue);
// Throws InvalidArgument for another name.
GemmEpilogue find_gemm_epilogue(const std::string& name);

// A GEMM to compute, without its data. M has any size, N (rows of B) is a multiple of 8, K a
// multiple of 32, of INT8 up to kMaxInt8Depth. With an epilogue there is no bias and D is BF16
// before it is encoded.
struct GemmProblem {
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  OperandFormat a;
  OperandFormat b;
  DType d;
  bool bias;
  GemmEpilogue epilogue = GemmEpilogue::kNone;
  // The format of D; 8 bits only with an epilogue that encodes.
  OperandFormat d_format = OperandFormat::kBFloat16;
  // Columns of the low-rank addend; 0 without one. With one there is no bias, and K is positive.
  std::int64_t addend_rank = 0;
};

// A kernel of the table, which all builds have. All accumulate in float32, and products of INT8 in
// int32. The latter are exact, so all kernels give the same D of INT8, bit for bit, with an
// epilogue fused or not: float32(sum) * scale of A's row * scale of B's row, rounded at each step.
//
//   reference    Decoded operands, sums in order of K. Runs on the CPU and on every CUDA device of
//                compute capability 8.0 or newer with the same result; slow. The others are tested
//                against it.
//   dequantize   Operands decoded to BF16 (exact for scale bytes of 3 and more) in the workspace,
//                then cuBLASLt's BF16 GEMM. Compute capability 8.0 to 9.0, 10.x, 12.x.
//   fp8_rowwise  Row-scaled operands, cuBLASLt's FP8 GEMM with row and column scales and fast
//                accumulation. Compute capability 9.0.
//   fp8_sm90     The same with a fused epilogue, a low-rank addend or both: sums over all of K
//                ("fast accumulation") are rounded to BF16, then scaled, then comes the epilogue,
//                both in float32; the result is rounded once more. Compute capability 9.0.
//   int8_sm90    INT8 operands, with or without a fused epilogue or a low-rank addend. No bias.
//                Compute capability 9.0.
//   int8_sm80    INT8 operands. No bias. Compute capability 8.0 or newer. Run on 9.0 alone.
//   mixed_sm90   BF16 activations and MXFP8 weights, which are decoded to BF16 (exact for scale
//                bytes of 3 and more) on their way to the tensor cores. A block with scale 255 is
//                NaN, but codes 0x7F and 0xFF under another scale, which no encoder writes, count
//                as 480. D in BF16, with or without a low-rank addend. Compute capability 9.0.
//   mxfp8_sm100  MXFP8 operands on Blackwell's block-scaled tensor cores, through CUTLASS. Compute
//                capability 10.0 and 10.3. Compiled and checked, but never run on such a device.
//   mxfp8_sm120  The same for 12.0 and 12.1. Compiled and checked, but never run on such a device.
struct GemmKernel;

const char* name(const GemmKernel& kernel);
std::vector<const GemmKernel*> gemm_kernels();
// Throws InvalidArgument for another name.
const GemmKernel& find_gemm_kernel(const std::string& kernel_name);

// The operand formats that a kernel multiplies, and the epilogues that it fuses (kNone for plain
// GEMMs), for lists.
std::vector<std::pair<OperandFormat, OperandFormat>> operand_formats(const GemmKernel& kernel);
std::vector<GemmEpilogue> epilogues(const GemmKernel& kernel);

// Version of the cuBLASLt that dequantize and fp8_rowwise use, such as "13.1.0"; empty without one.
// It is loaded when it is first needed: the process's own if it has one, else by its name.
std::string cublaslt_version();

// The CPU, in place of a device index.
inline constexpr int kHost = -1;

// Whether a kernel computes a problem on a device, and if not, why.
struct Support {
  bool ok;
  std::string reason;  // empty if ok
  explicit operator bool() const { return ok; }
};

// `device` is the index of a CUDA device, or kHost. A kernel that does not fuse a problem's
// epilogue supports it if it supports the plain GEMM: the epilogue is then a launch of its own.
// Throws InvalidArgument for sizes that no kernel takes, and Unsupported for a device that does not
// exist.
Support supports(const GemmKernel& kernel, const GemmProblem& problem, int device);

// A kernel that was considered for a problem.
struct GemmCandidate {
  const GemmKernel* kernel;
  bool fuses_epilogue;  // or the problem has none
  double cost;  // relative, see csrc/gemm/dispatch/heuristics.h; infinite if it is not supported
  std::string reason;  // why it was not chosen; empty for the one that was
};

// All kernels, the chosen one first, then in order of cost; no kernel is chosen if every one has a
// reason. Throws as supports() does.
//
// If the environment variable ZIMAGE_MXFP8_GEMM_KERNEL names a kernel, that is chosen for every
// problem that it supports. With ZIMAGE_MXFP8_GEMM_LOG=1 each problem that is chosen for is printed
// once to stderr, with the reasons. Both are read once.
std::vector<GemmCandidate> explain_gemm(const GemmProblem& problem, int device);

// The kernel of least cost; on the CPU the reference. Throws Unsupported if no kernel is fast
// there, naming the device and the kernels that run on it.
const GemmKernel& choose_gemm(const GemmProblem& problem, int device);

// Bytes of workspace that gemm() needs. Throws Unsupported if the kernel does not support the
// problem, naming those that do.
std::size_t workspace_size(const GemmKernel& kernel, const GemmProblem& problem, int device);

// BF16 elements, MXFP8 codes and blocked scales, row-scaled codes, or INT8. K is the matrix's
// width. In the order of OperandFormat. INT8 operands are multiplied with INT8.
using GemmOperand =
    std::variant<ConstMatrixView, ConstMXFP8View, ConstRowScaledView, ConstInt8View>;

struct SiluMultiply {};

// B's rows are heads of 128: first those of q, then those of k, then others.
struct RotateHeads {
  const void* q_weight;       // [128] BF16
  const void* k_weight;       // [128] BF16
  ConstMatrixView rotations;  // [M, 128] float32
  std::int64_t q_heads;
  std::int64_t k_heads;
  float eps;
};

// In the order of GemmEpilogue.
using EpilogueArguments = std::variant<std::monostate, SiluMultiply, RotateHeads>;

// X U^T, which is added to D. The products of row-scaled FP8 are scaled afterwards: to add Y Z^T to
// such a D, X is Y divided by A's scales (see narrow_gemm) and U is Z divided by B's.
struct LowRankAddend {
  ConstMatrixView x;  // [M, rank] BF16
  ConstMatrixView u;  // [N, rank] BF16
};

struct GemmArguments {
  GemmOperand a;     // [M, K]
  GemmOperand b;     // [N, K]
  const void* bias;  // [N] BF16, or null
  ActivationView d;  // [M, N / rows_per_column of the epilogue]
  EpilogueArguments epilogue = {};
  std::optional<LowRankAddend> addend = {};
};

struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// The problem that arguments state. Throws InvalidArgument if their shapes disagree.
GemmProblem problem_of(const GemmArguments& arguments);

// Computes a GEMM on the current CUDA device (see CudaStream in device.h), and an unfused epilogue
// after it. All memory is aligned to 16 bytes, as are the rows of D, of BF16 operands and of
// rotations; the workspace to 256. It has at least workspace_size() bytes, belongs to the call
// until its work on the stream is done, and may have any content. Scales of padding are not 255
// (quantize() makes them 0). Compute a GEMM of the kind once before capturing a graph, so that its
// libraries and kernels are loaded.
//
// Throws InvalidArgument for arguments that break these rules or overlap, Unsupported if the kernel
// does not support the problem.
void gemm(const GemmKernel& kernel, const GemmArguments& arguments, Workspace workspace,
          CudaStream stream);

// The X of a LowRankAddend, a GEMM with few columns: A is read once for up to 128 of them. Compute
// capability 9.0.
//
// With BF16 `a` [M, K] and `b` [R, K], D[m, r] = factors[r] * sum over k of A[m, k] * B[r, k].
// With row-scaled `a` [M, K] and `b` [2 R, K], D[m, r] = factors[r] * sum over k of code(A[m, k]) *
// (B[2 r, k] + B[2 r + 1, k]), without A's scales. B holds each row of a matrix as two terms: the
// row encoded, and what that encoding left out, encoded. Together they are as exact as BF16. With
// INT8 it is the same, multiplied by A's scales.
//
// Sums are those of the tensor cores; D is rounded once. K is a multiple of 32, and so is R.
// `factors` is [R], `d` [M, R] BF16. Rows are aligned to 16 bytes. Throws InvalidArgument for
// arguments that break these rules, Unsupported on other devices.
void narrow_gemm(const GemmOperand& a, const GemmOperand& b, const float* factors,
                 const MatrixView& d, CudaStream stream);

// The reference in host memory, without an epilogue, on `threads` threads (0: one per core). Bias
// and matrices need only the alignment of their elements.
void gemm(const GemmArguments& arguments, int threads = 0);

}  // namespace zimage_mxfp8
