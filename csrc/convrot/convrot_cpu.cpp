#include "cpu/block.h"
#include "cpu/kernels.h"
#include "zimage_mxfp8/convrot.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

namespace {

constexpr int kRows = kConvrotRows;  // that are rotated together, one per lane of a vector

// Whether element (i, j) of a Kronecker power of the 4x4 matrix is negative, for i ^ j: a digit in
// base 4 contributes a minus where the digits of i and j add up to 3, that is where it is 3 here.
struct Signs {
  bool negative[kMaxConvrotGroup / 4];
  constexpr Signs() : negative{} {
    for (int x = 0; x < static_cast<int>(kMaxConvrotGroup / 4); ++x) {
      bool odd = false;
      for (int rest = x; rest > 0; rest /= 4) odd ^= rest % 4 == 3;
      negative[x] = odd;
    }
  }
};
constexpr Signs kSigns;

// Adds four columns to the sums of four rows of the rotation, with the signs of the 4x4 matrix.
inline void add_columns(const float* __restrict columns, float* __restrict sums) {
  for (int i = 0; i < kRows; ++i) {
    const float a = columns[i], b = columns[kRows + i];
    const float c = columns[2 * kRows + i], d = columns[3 * kRows + i];
    sums[i] = sums[i] + a + b + c - d;
    sums[kRows + i] = sums[kRows + i] + a + b - c + d;
    sums[2 * kRows + i] = sums[2 * kRows + i] + a - b + c + d;
    sums[3 * kRows + i] = sums[3 * kRows + i] - a + b + c + d;
  }
}

// Multiplies a block by the rotation, without its factor. Each sum adds the columns in order; rows
// of the rotation that begin alike, up to the sign, share the beginning of their sums.
//
// `columns` is [2 * group, kRows]: the block, transposed, and its negative. `sums` is
// [group, kRows].
void rotate(const float* columns, int64_t group, float* sums) {
  memset(sums, 0, 4 * kRows * sizeof(float));
  add_columns(columns, sums);
  for (int64_t size = 4; size < group; size *= 4) {
    const int64_t part = size * kRows;
    // Adds part `from` of the columns to part `to` of the sums.
    const auto add_part = [&](int64_t to, int64_t from) {
      for (int64_t k = 0; k < size; k += 4) {
        for (int64_t row = 0; row < size; row += 4) {
          const bool negative = kSigns.negative[(row ^ k) / 4] != (to + from == 3);
          add_columns(columns + (negative ? group * kRows : 0) + from * part + k * kRows,
                      sums + to * part + row * kRows);
        }
      }
    };
    memcpy(sums + 2 * part, sums, static_cast<size_t>(part) * sizeof(float));
    add_part(0, 1);
    add_part(2, 1);
    memcpy(sums + part, sums, static_cast<size_t>(part) * sizeof(float));
    for (int64_t i = 0; i < part; ++i) sums[3 * part + i] = -sums[2 * part + i];
    for (int64_t from = 2; from < 4; ++from) {
      for (int64_t to = 0; to < 4; ++to) add_part(to, from);
    }
  }
}

// Rotates a block of rows, without the factor: sums is [group, kRows]. `load(lane, columns)` writes
// row `lane` of the block to columns[k * kRows].
template <typename Load>
void rotate_block(int64_t group, int rows, float* columns, float* sums, Load load) {
  float* target = group == 1 ? sums : columns;
  for (int lane = 0; lane < rows; ++lane) load(lane, target + lane);
  if (group == 1) return;
  for (int64_t i = 0; i < group * kRows; ++i) columns[group * kRows + i] = -columns[i];
  rotate(columns, group, sums);
}

// 1 / sqrt(group), a power of two.
float rotation_factor(int64_t group) {
  float factor = 1.0f;
  for (int64_t size = 1; size < group; size *= 4) factor *= 0.5f;
  return factor;
}

// Columns of codes that are written at once.
constexpr int64_t kSlice = 256;

// The codes of `kRows` rows of `cols` numbers, [cols, kRows], times `factor`, which is a power of
// two, are scaled(number, lane).
template <typename Scaled>
void write_codes(const QuantizeConvrotTask& task, const float* numbers, int64_t row_begin, int rows,
                 float factor, Scaled scaled) {
  // Adding this rounds to an integer, to nearest even.
  constexpr float kRound = 12582912.0f;
  for (int64_t begin = 0; begin < task.cols; begin += kSlice) {
    const int64_t count = task.cols - begin < kSlice ? task.cols - begin : kSlice;
    int8_t codes[kSlice * kRows];
    for (int64_t column = 0; column < count; ++column) {
      const float* of_column = numbers + (begin + column) * kRows;
      for (int lane = 0; lane < kRows; ++lane) {
        const float code = (scaled(of_column[lane] * factor, lane) + kRound) - kRound;
        codes[column * kRows + lane] = static_cast<int8_t>(static_cast<int32_t>(code));
      }
    }
    for (int lane = 0; lane < rows; ++lane) {
      int8_t* target = task.codes + (row_begin + lane) * task.cols + begin;
      for (int64_t column = 0; column < count; ++column) {
        target[column] = codes[column * kRows + lane];
      }
    }
  }
}

}  // namespace

bool quantize_convrot(const QuantizeConvrotTask& task, int64_t row_begin, int64_t row_end,
                      float* scratch) {
  const int rows = static_cast<int>(row_end - row_begin);
  float* columns = scratch;
  float* rotated = scratch + convrot_columns(task.group);  // [cols, kRows]
  if (rows < kRows) {                                      // lanes without a row must not hold NaN
    const int64_t floats = quantize_convrot_scratch(task.cols, task.group);
    memset(scratch, 0, static_cast<size_t>(floats) * sizeof(float));
  }
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    using Storage = typename Type::Storage;
    for (int64_t begin = 0; begin < task.cols; begin += task.group) {
      rotate_block(task.group, rows, columns, rotated + begin * kRows,
                   [&](int lane, float* target) {
                     const char* source = static_cast<const char*>(task.source) +
                                          ((row_begin + lane) * task.row_stride + begin) *
                                              static_cast<int64_t>(sizeof(Storage));
                     for (int64_t k = 0; k < task.group; ++k) {
                       Storage raw;
                       memcpy(&raw, source + k * static_cast<int64_t>(sizeof(raw)), sizeof(raw));
                       target[k * kRows] = as_float(Type::widen(raw));
                     }
                   });
    }
  });
  int32_t maximum[kRows] = {};
  for (int64_t column = 0; column < task.cols; ++column) {
    for (int lane = 0; lane < kRows; ++lane) {
      const uint32_t bits = as_bits(rotated[column * kRows + lane]) & 0x7FFFFFFF;
      const int32_t magnitude = static_cast<int32_t>(bits);
      maximum[lane] = magnitude > maximum[lane] ? magnitude : maximum[lane];
    }
  }
  const float factor = rotation_factor(task.group);
  float steps[kRows], inverses[kRows];
  for (int lane = 0; lane < kRows; ++lane) {
    if (lane < rows && maximum[lane] >= kInfinityBits) return true;
    const float amax = as_float(static_cast<uint32_t>(maximum[lane])) * factor;
    const float quotient = amax / 127.0f;
    steps[lane] = quotient > 1e-30f ? quotient : 1e-30f;
    inverses[lane] = 1.0f / (amax > 1e-12f ? amax : 1e-12f) * 127.0f;
  }
  if (task.group > 1) {
    write_codes(task, rotated, row_begin, rows, factor,
                [&](float number, int lane) { return number / steps[lane]; });
  } else {
    write_codes(task, rotated, row_begin, rows, factor,
                [&](float number, int lane) { return number * inverses[lane]; });
  }
  for (int lane = 0; lane < rows; ++lane) {
    task.scales[row_begin + lane] = task.group > 1 ? steps[lane] : 1.0f / inverses[lane];
  }
  return false;
}

void dequantize_convrot(const DequantizeConvrotTask& task, int64_t row_begin, int64_t row_end,
                        float* scratch) {
  const int rows = static_cast<int>(row_end - row_begin);
  const float factor = rotation_factor(task.group);
  float* columns = scratch;
  float* sums = scratch + convrot_columns(task.group);
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    using Storage = typename Type::Storage;
    for (int64_t begin = 0; begin < task.cols; begin += task.group) {
      rotate_block(task.group, rows, columns, sums, [&](int lane, float* target) {
        const int8_t* codes = task.codes + (row_begin + lane) * task.cols + begin;
        const float scale = task.scales[row_begin + lane];
        for (int64_t k = 0; k < task.group; ++k) {
          target[k * kRows] = static_cast<float>(codes[k]) * scale;
        }
      });
      for (int lane = 0; lane < rows; ++lane) {
        char* target =
            static_cast<char*>(task.target) +
            ((row_begin + lane) * task.row_stride + begin) * static_cast<int64_t>(sizeof(Storage));
        for (int64_t j = 0; j < task.group; ++j) {
          const Storage raw = Type::narrow(as_bits(sums[j * kRows + lane] * factor));
          memcpy(target + j * static_cast<int64_t>(sizeof(raw)), &raw, sizeof(raw));
        }
      }
    }
  });
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
