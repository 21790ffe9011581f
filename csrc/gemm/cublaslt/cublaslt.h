// cuBLASLt, loaded when it is first needed: a build or a wheel does not depend on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8::detail::cublaslt {

// D[m, n] = A[m, k] B[n, k]^T, all row-major, rows aligned to 16 bytes.
struct Gemm {
  int m, n, k;
  bool fp8;  // operands are E4M3 with one float32 scale per row, else BF16
  const void* a;
  const void* b;
  const void* a_scales;
  const void* b_scales;
  std::int64_t a_row_stride, b_row_stride;
  const void* bias;  // [n] BF16 or null; only if d is BF16
  void* d;
  DType d_dtype;  // BF16 or F32
  std::int64_t d_row_stride;
};

// The part of the workspace that cuBLASLt may use.
inline constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

// Why version `minimum` (120900 is 12.9.0) or newer of the library is missing; empty if it is
// found.
std::string unavailable(std::size_t minimum);

// "13.1.0", or empty if the library is missing.
std::string version();

// Whether cuBLASLt has an algorithm for a GEMM on the current device; pointers other than null may
// be anything. The answer is looked up once per kind of GEMM. Throws Unsupported if the library is
// missing, CudaError if it fails.
bool has_algorithm(const Gemm& gemm);

// Throws Unsupported if there is no algorithm for the GEMM, else as has_algorithm().
void multiply(const Gemm& gemm, void* workspace, CudaStream stream);

}  // namespace zimage_mxfp8::detail::cublaslt
