// INT8 with one float32 scale per row, of rotated rows: outliers are spread over 32 columns
// (QuaRot, Ashkboos et al., 2024, arXiv:2404.00456).
#pragma once

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

inline constexpr std::int64_t kRotationColumns = 32;  // that are rotated together

// Multiplies every 32 columns by Sylvester's Hadamard matrix / sqrt(32), which is orthonormal and
// its own inverse, and encodes every row. With x the products with the matrix of 1 and -1:
//
//   scale = amax / 127 * (1 / sqrt(32)) (float32),  code = x * (127 / amax), to nearest even
//
// x are the sums of a butterfly over columns 1, 2, 4, 8 and 16 apart, in this order, in float32;
// its product with the factor is rounded once, to the code. The product of two matrices does not
// change if both are rotated. A row with amax below 2^-100 becomes scale 0 and codes 0, one with
// NaN or infinity scale NaN and codes 0.
//
// `source` is BF16 [M, C], C a multiple of 32 up to kMaxFusedColumns (fused.h). Runs on the current
// CUDA device (see CudaStream in device.h). Codes are aligned to 16 bytes; rows that begin at
// multiples of 16 bytes are fastest. Throws InvalidArgument if shapes disagree, a pointer is null
// or the target overlaps with the source.
void quantize_rotated(const ConstMatrixView& source, const Int8View& target, CudaStream stream);

}  // namespace zimage_mxfp8
