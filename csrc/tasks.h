// Arguments of kernels: checked pointers and sizes of the whole matrices. Plain C
// types only, for all compilers and all instruction sets (see cpu/kernels.h).
#pragma once

#include <stdint.h>

namespace zimage_mxfp8 {

enum class DType : uint8_t;

namespace detail {

struct QuantizeTask {
  const void* source;
  DType dtype;
  int64_t row_stride;
  int64_t rows, cols;
  uint8_t* codes;
  uint8_t* scales;
};

struct DequantizeTask {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t rows, cols;
  void* target;
  DType dtype;
  int64_t row_stride;
};

struct ResidualTask {
  const void* original;
  DType dtype;
  int64_t row_stride;
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t rows, cols;
};

struct QuantizeRowsTask {
  const void* source;
  DType dtype;
  int64_t row_stride;
  int64_t rows, cols;
  uint8_t* codes;
  float* scales;
};

struct QuantizeConvrotTask {
  const void* source;
  DType dtype;
  int64_t row_stride;
  int64_t cols, group;
  int8_t* codes;
  float* scales;
};

struct DequantizeConvrotTask {
  const int8_t* codes;
  const float* scales;
  int64_t cols, group;
  void* target;
  DType dtype;
  int64_t row_stride;
};

// Rows with a smaller maximum become zeros: their scale could lose bits.
constexpr float kSmallestRowMaximum = 0x1p-100f;

}  // namespace detail
}  // namespace zimage_mxfp8
