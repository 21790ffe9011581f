#include "cpu/block.h"
#include "cpu/kernels.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

namespace {

// The codes of a row of INT8, `stride` apart, and zeros up to a whole block.
void decode_row(const GemmOperandTask& operand, int64_t row, int64_t k, int32_t* out,
                int64_t stride) {
  const int8_t* codes = static_cast<const int8_t*>(operand.codes) + row * operand.row_stride;
  for (int64_t i = 0; i < ceil_div(k, kBlock) * kBlock; ++i) out[i * stride] = i < k ? codes[i] : 0;
}

// Row `row` of another operand as `k` floats; without the scale of a row.
void decode_row(const GemmOperandTask& operand, int64_t row, int64_t k, float* out,
                int64_t stride) {
  const int64_t blocks = ceil_div(k, kBlock);
  for (int64_t block = 0; block < blocks; ++block) {
    uint32_t bits[kBlock];
    const int64_t at = row * operand.row_stride + block * kBlock;
    if (operand.format == OperandFormat::kBFloat16) {
      const int64_t count = k - block * kBlock < kBlock ? k - block * kBlock : kBlock;
      with_type(operand.dtype,
                [&](auto type) { load_block<decltype(type)>(operand.codes, at, count, bits); });
    } else {
      uint8_t byte = 127;
      if (operand.format == OperandFormat::kMXFP8) {
        byte = static_cast<const uint8_t*>(
            operand.scales)[scale_offset(row, block, ceil_div(blocks, 4))];
      }
      decode_block(static_cast<const uint8_t*>(operand.codes) + at, byte, bits);
    }
    for (int i = 0; i < kBlock; ++i) out[(block * kBlock + i) * stride] = as_float(bits[i]);
  }
}

float row_scale(const GemmOperandTask& operand, int64_t row) {
  return operand.format == OperandFormat::kRowScaled || operand.format == OperandFormat::kInt8
             ? static_cast<const float*>(operand.scales)[row]
             : 1.0f;
}

// Sums are float32 in order of K, or exact in int32.
template <typename Sum>
void multiply_panel(const GemmTask& task, int64_t panel, Sum* scratch) {
  const int64_t first = panel * kGemmPanel;
  const int64_t columns = task.n - first < kGemmPanel ? task.n - first : kGemmPanel;
  const int64_t depth = ceil_div(task.k, kBlock) * kBlock;
  Sum* b = scratch;                       // [depth, kGemmPanel]
  Sum* a = scratch + depth * kGemmPanel;  // [depth, kGemmRows]
  memset(scratch, 0, static_cast<size_t>(gemm_scratch(task.k)) * sizeof(Sum));
  for (int64_t j = 0; j < columns; ++j) decode_row(task.b, first + j, task.k, b + j, kGemmPanel);

  for (int64_t row = 0; row < task.m; row += kGemmRows) {
    const int64_t rows = task.m - row < kGemmRows ? task.m - row : kGemmRows;
    for (int64_t i = 0; i < rows; ++i) decode_row(task.a, row + i, task.k, a + i, kGemmRows);
    Sum sum[kGemmRows][kGemmPanel] = {};
    for (int64_t k = 0; k < task.k; ++k) {
      for (int64_t i = 0; i < kGemmRows; ++i) {
        for (int64_t j = 0; j < kGemmPanel; ++j) {
          sum[i][j] += a[k * kGemmRows + i] * b[k * kGemmPanel + j];
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      uint32_t bits[kBlock] = {};
      for (int64_t j = 0; j < columns; ++j) {
        float value = static_cast<float>(sum[i][j]) * row_scale(task.a, row + i) *
                      row_scale(task.b, first + j);
        if (task.bias) {
          uint16_t bias;
          memcpy(&bias, static_cast<const char*>(task.bias) + (first + j) * 2, 2);
          value += as_float(BFloat16::widen(bias));
        }
        bits[j] = as_bits(value);
      }
      with_type(task.d_dtype, [&](auto type) {
        using Type = decltype(type);
        store_block<Type>(bits, task.d, (row + i) * task.d_row_stride + first, columns);
      });
    }
  }
}

}  // namespace

void gemm_panel(const GemmTask& task, int64_t panel, float* scratch) {
  if (task.a.format == OperandFormat::kInt8) {
    static_assert(sizeof(int32_t) == sizeof(float));
    multiply_panel(task, panel, reinterpret_cast<int32_t*>(scratch));
  } else {
    multiply_panel(task, panel, scratch);
  }
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
