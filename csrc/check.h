// Argument checks that the operations share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

// Memory that an operation reads or writes, and its name for error messages.
struct MemoryRange {
  const void* begin;
  std::int64_t bytes;
  const char* what;
};

inline std::string shape_text(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

template <typename View>
void check_matrix(const View& matrix, const char* what) {
  if (matrix.rows < 0 || matrix.cols < 0) {
    throw InvalidArgument(std::string(what) + " has a negative size " +
                          shape_text(matrix.rows, matrix.cols));
  }
  if (matrix.rows > 1 && matrix.row_stride < matrix.cols) {
    throw InvalidArgument(std::string(what) + " has rows that overlap: row stride " +
                          std::to_string(matrix.row_stride) + " for " +
                          std::to_string(matrix.cols) + " columns");
  }
  if (!matrix.data && matrix.rows > 0 && matrix.cols > 0) {
    throw InvalidArgument(std::string(what) + " is a null pointer");
  }
  constexpr std::int64_t max_elements = std::int64_t{1} << 60;  // their bytes fit 64 bits
  if (matrix.cols > max_elements ||
      (matrix.rows > 1 && matrix.row_stride > max_elements / matrix.rows)) {
    throw InvalidArgument(std::string(what) +
                          " is too large: " + shape_text(matrix.rows, matrix.cols) +
                          " with row stride " + std::to_string(matrix.row_stride));
  }
}

template <typename View>
MemoryRange range_of(const View& matrix, const char* what) {
  const bool empty = matrix.rows == 0 || matrix.cols == 0;
  const std::int64_t elements = empty ? 0 : (matrix.rows - 1) * matrix.row_stride + matrix.cols;
  return {matrix.data, elements * static_cast<std::int64_t>(element_size(matrix.dtype)), what};
}

// Throws InvalidArgument if memory that is written overlaps with other memory of the call.
inline void check_disjoint(const MemoryRange& written, std::initializer_list<MemoryRange> others) {
  const auto begin = reinterpret_cast<std::uintptr_t>(written.begin);
  for (const MemoryRange& other : others) {
    const auto other_begin = reinterpret_cast<std::uintptr_t>(other.begin);
    if (written.bytes > 0 && other.bytes > 0 &&
        begin < other_begin + static_cast<std::uintptr_t>(other.bytes) &&
        other_begin < begin + static_cast<std::uintptr_t>(written.bytes)) {
      throw InvalidArgument(std::string(written.what) + " overlaps with " + other.what);
    }
  }
}

// Throws InvalidArgument unless memory begins at a multiple of `alignment` bytes. Empty memory may
// have any pointer.
inline void check_alignment(const MemoryRange& memory, std::size_t alignment) {
  if (memory.bytes > 0 && reinterpret_cast<std::uintptr_t>(memory.begin) % alignment != 0) {
    throw InvalidArgument(std::string(memory.what) + " must be aligned to " +
                          std::to_string(alignment) + " bytes");
  }
}

// Throws InvalidArgument unless all rows of a matrix begin at multiples of 16 bytes.
inline void check_rows(const MemoryRange& matrix, std::int64_t row_stride, std::size_t item) {
  check_alignment(matrix, 16);
  // Rows without elements may have any stride: that of torch.zeros(3, 0) is 1.
  if (matrix.bytes > 0 && static_cast<std::size_t>(row_stride) * item % 16 != 0) {
    throw InvalidArgument(std::string("the rows of ") + matrix.what +
                          " must begin at multiples of 16 bytes");
  }
}

// Memory that must exist and be aligned.
inline MemoryRange required_range(const void* data, std::int64_t bytes, std::size_t alignment,
                                  const char* what) {
  if (!data) throw InvalidArgument(std::string(what) + " is a null pointer");
  const MemoryRange memory{data, bytes, what};
  check_alignment(memory, alignment);
  return memory;
}

// Tokens of the items of a batch, which together are the rows of `what`.
inline void check_lengths(const std::vector<std::int64_t>& lengths, std::int64_t rows,
                          const char* what) {
  std::int64_t tokens = 0;
  for (const std::int64_t length : lengths) {
    if (length < 0 || length > rows - tokens) {
      throw InvalidArgument("lengths must be 0 or more, and the rows of " + std::string(what) +
                            " together");
    }
    tokens += length;
  }
  if (tokens != rows) {
    throw InvalidArgument("lengths are " + std::to_string(tokens) + " tokens, but " + what +
                          " has " + std::to_string(rows) + " rows");
  }
}

template <typename Plain, typename MXFP8>
void check_pair(const Plain& plain, const MXFP8& mxfp8, const char* what) {
  check_matrix(plain, what);
  if (plain.rows != mxfp8.rows || plain.cols != mxfp8.cols) {
    throw InvalidArgument(std::string(what) + " is " + shape_text(plain.rows, plain.cols) +
                          " but the MXFP8 matrix is " + shape_text(mxfp8.rows, mxfp8.cols));
  }
  if ((!mxfp8.codes || !mxfp8.scales) && plain.rows > 0 && plain.cols > 0) {
    throw InvalidArgument("the codes or the scales of the MXFP8 matrix are a null pointer");
  }
}

// The memory of a matrix and of its MXFP8 encoding, after check_pair().
struct PairRanges {
  MemoryRange plain, codes, scales;

  template <typename Plain, typename MXFP8>
  PairRanges(const Plain& matrix, const MXFP8& mxfp8, const char* what)
      : plain(range_of(matrix, what)),
        codes{mxfp8.codes, MXFP8Shape{mxfp8.rows, mxfp8.cols}.code_bytes(), "codes"},
        scales{mxfp8.scales, MXFP8Shape{mxfp8.rows, mxfp8.cols}.scale_bytes(), "scales"} {}
};

// The checks before a matrix is encoded, on the CPU or a device.
inline PairRanges check_encoding(const ConstMatrixView& source, const MXFP8View& target) {
  check_pair(source, target, "the source");
  const PairRanges memory(source, target, "the source");
  check_disjoint(memory.codes, {memory.plain, memory.scales});
  check_disjoint(memory.scales, {memory.plain});
  return memory;
}

}  // namespace zimage_mxfp8::detail
