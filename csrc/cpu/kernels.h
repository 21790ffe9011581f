// The CPU kernels, each compiled once per CpuTarget from one source file (*_cpu.cpp).
//
// Those sources include nothing that defines inline functions with external linkage, other than
// constexpr index arithmetic: the linker would keep one copy of such a function, maybe one with
// AVX-512 in it, for all targets.
#pragma once

#include <stdint.h>

#include "gemm/task.h"
#include "tasks.h"

namespace zimage_mxfp8 {
namespace detail {

struct ResidualSums {
  double squared_error, squared_signal, max_error;
};

// A kernel handles rows [row_begin, row_end); for quantize_tile these are padded rows of one
// 128-row tile.
struct Kernels {
  // Returns whether a NaN or an infinity was found.
  bool (*quantize_tile)(const QuantizeTask&, int64_t row_begin, int64_t row_end);
  void (*dequantize_rows)(const DequantizeTask&, int64_t row_begin, int64_t row_end);
  ResidualSums (*residual_sums)(const ResidualTask&, int64_t row_begin, int64_t row_end);
  void (*residual_dot)(const ResidualTask&, const double* x, double* out, int64_t row_begin,
                       int64_t row_end);
  bool (*row_is_finite)(const void* row, DType dtype, int64_t count);
  void (*cast_row)(const void* source, DType source_dtype, void* target, DType target_dtype,
                   int64_t count);
  void (*quantize_rows)(const QuantizeRowsTask&, int64_t row_begin, int64_t row_end);
  // At most kConvrotRows rows. `scratch` has quantize_convrot_scratch() or
  // dequantize_convrot_scratch() floats. Encoding returns whether a NaN or an infinity was found,
  // or appeared in sums.
  bool (*quantize_convrot)(const QuantizeConvrotTask&, int64_t row_begin, int64_t row_end,
                           float* scratch);
  void (*dequantize_convrot)(const DequantizeConvrotTask&, int64_t row_begin, int64_t row_end,
                             float* scratch);
  // Columns [panel * kGemmPanel, ...) of D, all rows. `scratch` has gemm_scratch(k) floats.
  void (*gemm_panel)(const GemmTask&, int64_t panel, float* scratch);
  // Adds `count` 16-bit elements to kSubHistograms tables of 65536 counters, which the caller adds
  // up. No counter may overflow: fewer than 2^32 elements per table.
  void (*count_bit_patterns)(const void* elements, int64_t count, uint32_t* counts);
};

constexpr int64_t kSubHistograms = 4;

constexpr int64_t kConvrotRows = 16;
constexpr int64_t convrot_columns(int64_t group) { return 2 * group * kConvrotRows; }
constexpr int64_t quantize_convrot_scratch(int64_t cols, int64_t group) {
  return convrot_columns(group) + cols * kConvrotRows;
}
constexpr int64_t dequantize_convrot_scratch(int64_t group) {
  return convrot_columns(group) + group * kConvrotRows;
}

constexpr int64_t kGemmPanel = 32;  // columns of D that are computed together
constexpr int64_t kGemmRows = 4;    // rows
constexpr int64_t gemm_scratch(int64_t k) {
  return (k + 31) / 32 * 32 * (kGemmPanel + kGemmRows);  // whole blocks
}

#define ZM_DECLARE_KERNELS(target)                                                        \
  namespace target {                                                                      \
  bool quantize_tile(const QuantizeTask&, int64_t, int64_t);                              \
  void dequantize_rows(const DequantizeTask&, int64_t, int64_t);                          \
  ResidualSums residual_sums(const ResidualTask&, int64_t, int64_t);                      \
  void residual_dot(const ResidualTask&, const double*, double*, int64_t, int64_t);       \
  bool row_is_finite(const void*, DType, int64_t);                                        \
  void cast_row(const void*, DType, void*, DType, int64_t);                               \
  void quantize_rows(const QuantizeRowsTask&, int64_t, int64_t);                          \
  bool quantize_convrot(const QuantizeConvrotTask&, int64_t, int64_t, float*);            \
  void dequantize_convrot(const DequantizeConvrotTask&, int64_t, int64_t, float*);        \
  void gemm_panel(const GemmTask&, int64_t, float*);                                      \
  void count_bit_patterns(const void*, int64_t, uint32_t*);                               \
  inline constexpr Kernels kKernels{quantize_tile, dequantize_rows,   residual_sums,      \
                                    residual_dot,  row_is_finite,     cast_row,           \
                                    quantize_rows, quantize_convrot,  dequantize_convrot, \
                                    gemm_panel,    count_bit_patterns};                   \
  }

ZM_DECLARE_KERNELS(baseline)
ZM_DECLARE_KERNELS(avx2)
ZM_DECLARE_KERNELS(avx512)
#undef ZM_DECLARE_KERNELS

// The kernels of active_cpu_target().
const Kernels& active_kernels();

}  // namespace detail
}  // namespace zimage_mxfp8
