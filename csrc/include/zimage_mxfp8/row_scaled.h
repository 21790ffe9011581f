// E4M3 with one float32 scale per row, which Hopper's FP8 tensor cores take at full rate.
#pragma once

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// Encodes every row of `source` with a scale of its own, as activations are encoded per token:
//
//   scale = amax / 448 (float32),  code = x * (448 / amax), to nearest even, in E4M3
//
// A row with amax below 2^-100 becomes scale 0 and codes 0. A row with NaN or infinity gets scale
// NaN, and so becomes a row of NaN in every GEMM. The bytes depend neither on the CPU target nor on
// the device nor on `threads`.
//
// Throws InvalidArgument if shapes disagree, a size is negative, a pointer is null or the target
// overlaps with the source.
void quantize_rows(const ConstMatrixView& source, const RowScaledView& target, int threads = 0);

// The same on the current CUDA device (see CudaStream in device.h). Codes are aligned to 16 bytes;
// columns a multiple of 16 and rows that begin at multiples of 16 bytes are fastest.
void quantize_rows(const ConstMatrixView& source, const RowScaledView& target, CudaStream stream);

struct FoldStats {
  std::int64_t changed = 0;     // elements with another value than before
  double relative_error = 0.0;  // Frobenius norm of the change / of the matrix
};

// Folds the scales of the blocks of every row into one power of two: since all are powers of two,
// the difference moves into the codes' exponents, and only codes that fall below E4M3's normal
// range (2^-6) lose bits. Both matrices are in host memory.
//
// Throws PrecisionLoss if the relative error passes `bound`, InvalidArgument for a NaN code or
// scale (the target is then unspecified), a bound that is negative or NaN, and as quantize_rows
// does.
FoldStats fold(const ConstMXFP8View& source, const RowScaledView& target, double bound = 1e-3,
               int threads = 0);

// The change by folding in one row; three doubles, so that an array of them is [rows, 3] of
// float64.
struct FoldRowStats {
  double changed = 0.0;  // elements, as in FoldStats
  double squared_error = 0.0;
  // Sum of the squares. NaN if the row has a NaN code or scale; the others are then the first and
  // the last column of its first block that has one, and the row of the target is unspecified.
  double squared_signal = 0.0;
};

// The same on the current CUDA device (see CudaStream in device.h), with the same bytes. Codes and
// the source's scales are aligned to 16 bytes. `stats` is [rows] in device memory, for fold_stats()
// once the work is done.
void fold(const ConstMXFP8View& source, const RowScaledView& target, FoldRowStats* stats,
          CudaStream stream);

// The change by folding in all rows of a matrix; `stats` is [rows] in host memory. Throws as fold()
// does.
FoldStats fold_stats(const FoldRowStats* stats, std::int64_t rows, double bound = 1e-3);

}  // namespace zimage_mxfp8
