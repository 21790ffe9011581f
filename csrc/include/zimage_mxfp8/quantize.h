// MXFP8 encoding and decoding (OCP Microscaling Formats v1.0: E4M3 elements, E8M0 scales, blocks
// of 32 along a row), with NVIDIA's round-up rule for the scale.
#pragma once

#include <optional>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// Encodes `source` into `target`, which the caller allocated.
//
//   scale byte = clamp(ceil(log2(amax / 448)) + 127, 0, 254), the value being 2^(byte - 127)
//   code       = x * 2^(127 - byte), to nearest even, in E4M3 (saturation cannot occur)
//
// A block with amax below 448 * 2^-127 becomes scale 0 and codes 0 (also one of only -0.0): readers
// disagree on the meaning of scale byte 0, and with codes 0 it does not matter. Elements and rows
// that only padding adds have code 0; scales of padding are 0.
//
// Deterministic: the bytes depend neither on the CPU target nor on `threads` (0: one per core).
// Denormals are not flushed, in any flush-to-zero mode of the caller.
//
// Throws InvalidArgument if shapes disagree, a size is negative, a pointer is null or the target
// overlaps with the source; NonFiniteValue for the first NaN or infinity in row-major order, after
// everything is encoded (a block with one has scale 255 and codes 0x7F: NaN for every reader).
void quantize(const ConstMatrixView& source, const MXFP8View& target, int threads = 0);

// The same on the current CUDA device, with the same bytes (see CudaStream in device.h). Codes and
// scales are aligned to 16 bytes, the source to its elements. NaN and infinity are not reported:
// look for scale bytes of 255. Rows that begin at multiples of 16 bytes are fastest.
void quantize(const ConstMatrixView& source, const MXFP8View& target, CudaStream stream);

// Decodes `source` into `target`: e4m3(code) * 2^(byte - 127), rounded to nearest even where the
// target's type is too narrow. Codes 0x7F and 0xFF and scale byte 255 give NaN.
//
// Throws InvalidArgument as quantize does.
void dequantize(const ConstMXFP8View& source, const MatrixView& target, int threads = 0);

// The same on the current CUDA device, with the same bytes and the alignments of quantize.
void dequantize(const ConstMXFP8View& source, const MatrixView& target, CudaStream stream);

struct Position {
  std::int64_t row;
  std::int64_t column;
};

// The first NaN or infinity of `matrix` in row-major order. Throws InvalidArgument as quantize
// does.
std::optional<Position> find_nonfinite(const ConstMatrixView& matrix, int threads = 0);

}  // namespace zimage_mxfp8
