// Operations of Z-Image's DiT between its GEMMs, on CUDA devices: each takes one pass over memory
// and writes activations in the format that the next GEMM takes.
//
// Matrices are BF16, the arithmetic is float32, and every result is rounded to BF16 once. The 8-bit
// formats encode the rounded value: the bytes equal quantize(), quantize_rows() or
// quantize_rotated() of the BF16 result.
//
// All run on the current CUDA device (see CudaStream in device.h). Elements need no alignment, but
// codes and block scales are aligned to 16 bytes; matrices with rows, and vectors, that begin at
// multiples of 16 bytes are fastest. NaN and infinity are encoded as by quantize() on a device and
// by quantize_rows().
//
// All throw InvalidArgument if shapes disagree, a size is negative, a matrix is not BF16, a pointer
// is null, eps is negative or NaN, or memory that is written overlaps with other memory.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// The widest row that these operations take.
inline constexpr std::int64_t kMaxFusedColumns = 16384;

// An activation to write, [M, C] in one of four formats. In INT8 it is rotated, see rotated.h, and
// C is a multiple of 32.
using ActivationView = std::variant<MatrixView, MXFP8View, RowScaledView, Int8View>;

// target = `left` and `right` side by side, [M, L] and [M, R]: [M, L + R].
void join_columns(const ConstMatrixView& left, const ConstMatrixView& right,
                  const ActivationView& target, CudaStream stream);

// target = silu(gate) * up, all [M, C]. `gate` and `up` may be parts of one matrix. Where gate is
// between -88.8 and -87.3 the result is 0, which is off by 1e-36 * up.
void silu_multiply(const ConstMatrixView& gate, const ConstMatrixView& up,
                   const ActivationView& target, CudaStream stream);

// The weight of an RMSNorm and the modulation of its result: one row per item (element of the
// batch).
struct NormWeights {
  const void* weight;                         // [C] BF16
  std::optional<ConstMatrixView> modulation;  // [I, C] BF16, or none
};

// The item of each row: [M] int32, or null if all rows belong to the only one. With a modulation, a
// row with an item outside [0, I) becomes NaN.
using Items = const std::int32_t*;

// target = RMSNorm(x) * weight * (1 + modulation[item]), where RMSNorm(x) is
// x / sqrt(mean(x^2) + eps) of each row. `x` is [M, C].
void norm_modulate(const ConstMatrixView& x, const NormWeights& norm, Items items, float eps,
                   const ActivationView& target, CudaStream stream);

// The norm that follows a residual addition, and where its result goes.
struct NextNorm {
  NormWeights norm;
  ActivationView target;
};

// A matrix with one factor for all of its elements.
struct ScaledMatrix {
  ConstMatrixView matrix;
  const float* factor;  // in the device's memory
};

// x += tanh(modulation[item]) * RMSNorm(y) * weight, in place; without a modulation its factor is
// 1. If there is an addend, its factor * matrix is added too, before x is rounded. Then, if there
// is a next norm, norm_modulate() of the rounded x. `x`, `y` and the addend are [M, C].
void add_norm_modulate(const MatrixView& x, const ConstMatrixView& y, const NormWeights& norm,
                       const std::optional<ScaledMatrix>& addend,
                       const std::optional<NextNorm>& next, Items items, float eps,
                       CudaStream stream);

inline constexpr std::int64_t kHeadSize = 128;

// RMSNorm and rotary embedding of the query and key heads, in place. The columns of `matrix` are
// heads of 128: first those of q, then those of k, then others, such as those of v, which do not
// change. Every head of q and k becomes RMSNorm(head) * weight, where its adjacent pairs are then
// complex numbers that are multiplied with those of `rotations`, rounded once at the end.
//
// The weights are [128] BF16; `rotations` is [M, 128] float32: 64 pairs of cosine and sine per row.
void rotate_heads(const MatrixView& matrix, const void* q_weight, const void* k_weight,
                  const ConstMatrixView& rotations, std::int64_t q_heads, std::int64_t k_heads,
                  float eps, CudaStream stream);

}  // namespace zimage_mxfp8
