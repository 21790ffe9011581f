// Products of row-scaled FP8, fused with what Z-Image's DiT computes next: what lies between does
// not go to memory. Hopper only.
//
// A product is A B^T, where A [M, K] and B [N, K] are row-scaled (see row_scaled.h). Sums are the
// tensor cores' own over all of K ("fast accumulation"), as those of cuBLASLt in the path
// "row-scaled" are. They are rounded to BF16, then scaled, then comes the operation of fused.h,
// both in float32; the result is rounded once more. So it differs from gemm() and that operation by
// the order of sums, and by where roundings are.
//
// All run on the current CUDA device (see CudaStream in device.h). Memory is aligned to 16 bytes,
// and so are the rows of the target, which is BF16, and of rotations. All throw InvalidArgument if
// shapes disagree, a size is negative or beyond 2^30, K is 0 or not a multiple of 16, a dtype is
// another one, a pointer is null or not aligned, eps is negative or NaN, the target overlaps with
// what is read, or memory is not that device's; and, if there is anything to compute, Unsupported
// where supports_fused_gemm() says no.
#pragma once

#include <cstdint>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// Whether a device has these operations; kHost has not. Throws Unsupported if there is no such
// device.
Support supports_fused_gemm(int device);

// Whether they are faster there than gemm() and an operation of its own, for A [m, K] and B [n, K]:
// their tiles are large, and must be enough to keep all multiprocessors busy. Throws as
// supports_fused_gemm() does.
bool prefers_fused_gemm(std::int64_t m, std::int64_t n, int device);

// silu_multiply() of A G^T and A U^T, where G is the upper and U the lower half of `b` [2 C, K].
// The target is [M, C], with C a multiple of 8.
void gemm_silu_multiply(const ConstRowScaledView& a, const ConstRowScaledView& b,
                        const MatrixView& target, CudaStream stream);

// rotate_heads() of A B^T, where B is [3 * heads * 128, K]; weights, rotations and heads are as
// they are there. The target is [M, 3 * heads * 128].
void gemm_rotate_heads(const ConstRowScaledView& a, const ConstRowScaledView& b,
                       const void* q_weight, const void* k_weight, const ConstMatrixView& rotations,
                       std::int64_t heads, float eps, const MatrixView& target, CudaStream stream);

}  // namespace zimage_mxfp8
