// The change by quantisation, W - Wq, measured or multiplied by a vector.
#pragma once

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// Sums over all elements of a matrix, in float64.
struct ResidualStats {
  double squared_error = 0.0;   // sum of (w - wq)^2
  double squared_signal = 0.0;  // sum of w^2
  double max_error = 0.0;       // max |w - wq|
};

// Compares `original` with its encoding. The result depends neither on the CPU target nor on
// `threads`. Throws InvalidArgument if the shapes disagree.
ResidualStats measure_residual(const ConstMatrixView& original, const ConstMXFP8View& quantized,
                               int threads = 0);

// out[row] = sum over k of (original[row, k] - quantized[row, k]) * x[k], in float64.
// `x` has `cols` elements, `out` has `rows`. Throws InvalidArgument if the shapes disagree.
void residual_times_vector(const ConstMatrixView& original, const ConstMXFP8View& quantized,
                           const double* x, double* out, int threads = 0);

}  // namespace zimage_mxfp8
