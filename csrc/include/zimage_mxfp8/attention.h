// Softmax attention without a mask, over sequences of tokens that follow one another.
#pragma once

#include <cstdint>
#include <vector>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// out = softmax(q k^T / sqrt(128)) v of every head, where the tokens of an item attend to each
// other. `qkv` is [M, 3 * heads * 128]: all heads of q, of k and of v, as rotate_heads() leaves
// them. `out` is [M, heads * 128], and `lengths` has the tokens of each item, M together.
//
// In host memory both matrices are float32. Throws InvalidArgument if shapes or dtypes disagree, a
// pointer is null, a length is negative, or the matrices overlap.
void attend(const ConstMatrixView& qkv, std::int64_t heads,
            const std::vector<std::int64_t>& lengths, const MatrixView& out, int threads = 0);

// The same on the current CUDA device (see CudaStream in device.h). Both matrices are BF16, with
// rows that begin at multiples of 16 bytes; the arithmetic is float32, rounded once at the end. A
// plain kernel without tensor cores: with thousands of tokens it takes longer than all GEMMs of a
// block together. Programs that need speed use cuDNN or FlashAttention in its place.
void attend(const ConstMatrixView& qkv, std::int64_t heads,
            const std::vector<std::int64_t>& lengths, const MatrixView& out, CudaStream stream);

}  // namespace zimage_mxfp8
