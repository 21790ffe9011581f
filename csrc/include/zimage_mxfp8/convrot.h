// INT8 ConvRot: a rotated matrix in INT8 with one float32 scale per row, as convert_to_quant,
// comfy-kitchen and ComfyUI store it.
//
// Blocks of `group` columns are multiplied by an orthonormal symmetric matrix, so that rotating a
// second time undoes it: the Kronecker power, with `group` rows, of
//
//        |  1  1  1 -1 |
//   1/2  |  1  1 -1  1 |
//        |  1 -1  1  1 |
//        | -1  1  1  1 |
//
// `group` is a power of 4 up to kMaxConvrotGroup that divides the number of columns. 1 stands for
// no rotation.
#pragma once

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

inline constexpr std::int64_t kMaxConvrotGroup = 1024;

// Rotates and encodes `source`. With r the rotated row, all in float32:
//
//   rotated:      scale = max(amax / 127, 1e-30),  code = r / scale
//   not rotated:  factor = 1 / max(amax, 1e-12) * 127, scale = 1 / factor, code = r * factor
//
// to nearest even. -128 does not occur. The sums of the rotation are float32 and add columns in
// order, as torch does on Intel CPUs, so the bytes are those of convert_to_quant there. They
// depend neither on the CPU target nor on `threads`.
//
// Throws InvalidArgument if shapes disagree, a size is negative, `group` is no power of 4 that
// divides the columns, a pointer is null, the target overlaps with the source, or sums leave
// float32's range; NonFiniteValue for the first NaN or infinity in row-major order.
void quantize_convrot(const ConstMatrixView& source, std::int64_t group, const Int8View& target,
                      int threads = 0);

// Decodes and rotates back: code * scale and its sums in float32, rounded to nearest even where the
// target's type is too narrow. Throws InvalidArgument as quantize_convrot does.
void dequantize_convrot(const ConstInt8View& source, std::int64_t group, const MatrixView& target,
                        int threads = 0);

}  // namespace zimage_mxfp8
