// How often each bit pattern of a 16-bit element type occurs.
#pragma once

#include <cstdint>

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

inline constexpr std::int64_t kBitPatterns = 65536;

// Adds to counts[p], for each 16-bit pattern p, the number of elements of `matrix` that have it.
// `counts` has kBitPatterns elements. Every statistic of the values follows from the counts without
// looking at the matrix again. The result depends neither on the CPU target nor on `threads` (0:
// one per core). Throws InvalidArgument if the elements do not have 16 bits, a size is negative or
// a pointer is null.
void count_bit_patterns(const ConstMatrixView& matrix, std::uint64_t* counts, int threads = 0);

}  // namespace zimage_mxfp8
