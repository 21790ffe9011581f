#pragma once

#include "zimage_mxfp8/fused.h"

namespace zimage_mxfp8::detail {

// Throws InvalidArgument unless `width` is a number of whole heads, enough for those of q and k.
void check_heads(std::int64_t width, const char* what, std::int64_t q_heads, std::int64_t k_heads);

// The operations of fused.h with arguments that are checked, and at least one row.

void join_columns_cuda(const ConstMatrixView& left, const ConstMatrixView& right,
                       const ActivationView& target, CudaStream stream);
void silu_multiply_cuda(const ConstMatrixView& gate, const ConstMatrixView& up,
                        const ActivationView& target, CudaStream stream);
void norm_modulate_cuda(const ConstMatrixView& x, const NormWeights& norm, Items items, float eps,
                        const ActivationView& target, CudaStream stream);
void add_norm_modulate_cuda(const MatrixView& x, const ConstMatrixView& y, const NormWeights& norm,
                            const std::optional<ScaledMatrix>& addend,
                            const std::optional<NextNorm>& next, Items items, float eps,
                            CudaStream stream);
void rotate_heads_cuda(const MatrixView& matrix, const void* q_weight, const void* k_weight,
                       const ConstMatrixView& rotations, std::int64_t q_heads, std::int64_t k_heads,
                       float eps, CudaStream stream);

}  // namespace zimage_mxfp8::detail
