// Views of matrices that the caller owns, and the shapes that MXFP8 storage has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zimage_mxfp8 {

// Element types of plain (not quantised) matrices.
enum class DType : std::uint8_t {
  kBFloat16,  // bfloat16: 1 sign, 8 exponent, 7 mantissa bits
  kFloat16,   // IEEE 754 binary16
  kFloat32,   // IEEE 754 binary32
};

// Bytes of one element.
constexpr std::size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A matrix of `rows` x `cols` elements, rows `row_stride` elements apart, elements of a row
// adjacent. No alignment is needed.
struct ConstMatrixView {
  const void* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t row_stride;
};

struct MatrixView {
  void* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t row_stride;
};

inline constexpr std::int64_t kBlockSize = 32;  // elements that share one scale, along a row

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Storage of a [rows, cols] matrix in MXFP8.
struct MXFP8Shape {
  std::int64_t rows;
  std::int64_t cols;

  // Codes: [code_rows, code_cols] bytes, row-major.
  constexpr std::int64_t code_rows() const { return round_up(rows, kBlockSize); }
  constexpr std::int64_t code_cols() const { return round_up(cols, kBlockSize); }
  constexpr std::int64_t code_bytes() const { return code_rows() * code_cols(); }
  // Blocks of one row that hold elements.
  constexpr std::int64_t blocks() const { return ceil_div(cols, kBlockSize); }
  // Scales: [scale_rows, scale_cols] bytes in the 128x4 blocked layout of scale_layout.h.
  constexpr std::int64_t scale_rows() const { return round_up(code_rows(), 128); }
  constexpr std::int64_t scale_cols() const { return round_up(blocks(), 4); }
  constexpr std::int64_t scale_bytes() const { return scale_rows() * scale_cols(); }
};

// A matrix in MXFP8. `codes` and `scales` have the sizes that MXFP8Shape{rows, cols} gives.
struct ConstMXFP8View {
  const std::uint8_t* codes;
  const std::uint8_t* scales;
  std::int64_t rows;
  std::int64_t cols;
};

struct MXFP8View {
  std::uint8_t* codes;
  std::uint8_t* scales;
  std::int64_t rows;
  std::int64_t cols;
};

// A matrix in E4M3 with one float32 scale per row: element = e4m3(code) * scale of its row. Codes
// are [rows, cols] bytes, row-major.
struct ConstRowScaledView {
  const std::uint8_t* codes;
  const float* scales;
  std::int64_t rows;
  std::int64_t cols;
};

struct RowScaledView {
  std::uint8_t* codes;
  float* scales;
  std::int64_t rows;
  std::int64_t cols;
};

// A matrix in INT8 with one float32 scale per row: element = code * scale of its row, codes from
// -127 to 127. Codes are [rows, cols] bytes, row-major.
struct ConstInt8View {
  const std::int8_t* codes;
  const float* scales;
  std::int64_t rows;
  std::int64_t cols;
};

struct Int8View {
  std::int8_t* codes;
  float* scales;
  std::int64_t rows;
  std::int64_t cols;
};

}  // namespace zimage_mxfp8
