#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"
#include "row_scaled/fold_cuda.h"
#include "zimage_mxfp8/row_scaled.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8 {
namespace {

constexpr int kCodes = 0x7F;  // magnitudes of E4M3 that are numbers
constexpr int kMaxUp = 17;    // 2^-9, the smallest code, can move up so far: 2^8 <= 448
constexpr int kMaxDown = 19;  // from this on every code becomes zero: 448 * 2^-19 < 2^-10
constexpr int kShifts = kMaxUp + kMaxDown + 1;

// The result for each magnitude of a code, in a block with a scale 2^shift times too small.
struct Shifted {
  std::array<std::uint8_t, kCodes> code;
  std::array<double, kCodes> squared_error;  // (value - new value * 2^shift)^2
};

struct Tables {
  std::array<double, kCodes> value;
  std::array<int, kCodes> headroom;  // largest h with value * 2^h <= 448
  std::array<Shifted, kShifts> shifted;

  Tables() {
    for (std::size_t i = 0; i < kCodes; ++i) {
      const int field = static_cast<int>(i >> 3), mantissa = static_cast<int>(i & 7);
      value[i] = field == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, field - 10);
      headroom[i] = i == 0 ? kMaxUp : static_cast<int>(std::floor(std::log2(448.0 / value[i])));
    }
    for (int shift = -kMaxUp; shift <= kMaxDown; ++shift) {
      Shifted& table = shifted[static_cast<std::size_t>(shift + kMaxUp)];
      for (std::size_t i = 0; i < kCodes; ++i) {
        const std::size_t code = nearest(std::ldexp(value[i], -shift));
        table.code[i] = static_cast<std::uint8_t>(code);
        const double error = value[i] - std::ldexp(value[code], shift);
        table.squared_error[i] = error * error;
      }
    }
  }

  // The code nearest to a value of at most 448; ties go to the even one.
  std::size_t nearest(double wanted) const {
    const auto above = static_cast<std::size_t>(
        std::lower_bound(value.begin(), value.end(), wanted) - value.begin());
    if (above == kCodes) return kCodes - 1;
    if (above == 0 || value[above] == wanted) return above;
    const double low = wanted - value[above - 1], high = value[above] - wanted;
    if (low == high) return above % 2 == 0 ? above : above - 1;
    return high < low ? above : above - 1;
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

FoldRowStats fold_row(const ConstMXFP8View& source, const RowScaledView& target, std::int64_t row) {
  const Tables& table = tables();
  const MXFP8Shape shape{source.rows, source.cols};
  const std::int64_t blocks = shape.blocks(), tiles = ceil_div(blocks, 4);
  const std::uint8_t* codes = source.codes + row * shape.code_cols();
  std::uint8_t* out = target.codes + row * source.cols;

  // The smallest scale that no block overflows; at least 2^-126, a float32 normal.
  int row_byte = 1;
  for (std::int64_t block = 0; block < blocks; ++block) {
    std::uint8_t largest = 0;
    for (std::int64_t i = 0; i < kBlockSize; ++i) {
      largest = std::max<std::uint8_t>(largest, codes[block * kBlockSize + i] & 0x7F);
    }
    const int byte = source.scales[scale_offset(row, block, tiles)];
    if (largest == 0x7F || byte == 255) {
      return {static_cast<double>(block * kBlockSize),
              static_cast<double>(std::min((block + 1) * kBlockSize, source.cols) - 1),
              std::numeric_limits<double>::quiet_NaN()};
    }
    if (largest != 0) row_byte = std::max(row_byte, byte - table.headroom[largest]);
  }
  target.scales[row] = std::ldexp(1.0f, row_byte - 127);

  FoldRowStats sums;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const int byte = source.scales[scale_offset(row, block, tiles)];
    const int shift = std::clamp(row_byte - byte, -kMaxUp, kMaxDown);
    const Shifted& shifted = table.shifted[static_cast<std::size_t>(shift + kMaxUp)];
    double error = 0.0, signal = 0.0;
    const std::int64_t begin = block * kBlockSize, end = std::min(begin + kBlockSize, source.cols);
    for (std::int64_t column = begin; column < end; ++column) {
      const std::uint8_t code = codes[column], magnitude = code & 0x7F;
      out[column] = static_cast<std::uint8_t>(shifted.code[magnitude] | (code & 0x80));
      const double squared_error = shifted.squared_error[magnitude];
      sums.changed += squared_error > 0.0 ? 1.0 : 0.0;
      error += squared_error;
      signal += table.value[magnitude] * table.value[magnitude];
    }
    sums.squared_error += std::ldexp(error, 2 * (byte - 127));
    sums.squared_signal += std::ldexp(signal, 2 * (byte - 127));
  }
  return sums;
}

void check_bound(double bound) {
  if (!(bound >= 0.0)) throw InvalidArgument("the bound must be 0 or more");
}

struct FoldMemory {
  detail::MemoryRange from_codes, from_scales, codes, scales;
};

FoldMemory check(const ConstMXFP8View& source, const RowScaledView& target) {
  if (source.rows < 0 || source.cols < 0) throw InvalidArgument("the source has a negative size");
  if (source.rows != target.rows || source.cols != target.cols) {
    throw InvalidArgument("the MXFP8 matrix is " + detail::shape_text(source.rows, source.cols) +
                          " but the row-scaled matrix is " +
                          detail::shape_text(target.rows, target.cols));
  }
  const MXFP8Shape shape{source.rows, source.cols};
  const FoldMemory memory{{source.codes, shape.code_bytes(), "the source's codes"},
                          {source.scales, shape.scale_bytes(), "the source's scales"},
                          {target.codes, target.rows * target.cols, "the target's codes"},
                          {target.scales, target.rows * static_cast<std::int64_t>(sizeof(float)),
                           "the target's scales"}};
  for (const detail::MemoryRange& range :
       {memory.from_codes, memory.from_scales, memory.codes, memory.scales}) {
    if (!range.begin && range.bytes > 0) {
      throw InvalidArgument("codes or scales are a null pointer");
    }
  }
  detail::check_disjoint(memory.codes, {memory.scales, memory.from_codes, memory.from_scales});
  detail::check_disjoint(memory.scales, {memory.from_codes, memory.from_scales});
  detail::check_alignment(memory.scales, sizeof(float));
  return memory;
}

}  // namespace

FoldStats fold(const ConstMXFP8View& source, const RowScaledView& target, double bound,
               int threads) {
  check_bound(bound);
  check(source, target);
  std::vector<FoldRowStats> stats(static_cast<std::size_t>(source.rows));
  detail::parallel_for(source.rows, detail::row_grain(source.cols), threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t row = begin; row < end; ++row) {
                           stats[static_cast<std::size_t>(row)] = fold_row(source, target, row);
                         }
                       });
  return fold_stats(stats.data(), source.rows, bound);
}

void fold(const ConstMXFP8View& source, const RowScaledView& target, FoldRowStats* stats,
          CudaStream stream) {
  const FoldMemory memory = check(source, target);
  if (source.rows == 0) return;
  if (!stats) throw InvalidArgument("the statistics are a null pointer");
  const detail::MemoryRange to_stats{
      stats, source.rows * static_cast<std::int64_t>(sizeof(FoldRowStats)), "the statistics"};
  detail::check_disjoint(to_stats,
                         {memory.from_codes, memory.from_scales, memory.codes, memory.scales});
  for (const detail::MemoryRange& range : {memory.from_codes, memory.from_scales, memory.codes}) {
    detail::check_alignment(range, 16);
  }
  detail::check_alignment(to_stats, sizeof(double));
  detail::check_device_memory(
      {memory.from_codes, memory.from_scales, memory.codes, memory.scales, to_stats});
  detail::fold_cuda(source, target, stats, stream);
}

FoldStats fold_stats(const FoldRowStats* stats, std::int64_t rows, double bound) {
  check_bound(bound);
  if (rows < 0 || (!stats && rows > 0)) {
    throw InvalidArgument("the statistics are a null pointer or have a negative size");
  }
  // Added in order of the rows: neither threads nor devices change the result.
  FoldRowStats total;
  for (std::int64_t row = 0; row < rows; ++row) {
    const FoldRowStats& sums = stats[row];
    if (std::isnan(sums.squared_signal)) {
      throw InvalidArgument("the matrix has NaN in row " + std::to_string(row) + ", columns " +
                            std::to_string(static_cast<std::int64_t>(sums.changed)) + " to " +
                            std::to_string(static_cast<std::int64_t>(sums.squared_error)));
    }
    total.changed += sums.changed;
    total.squared_error += sums.squared_error;
    total.squared_signal += sums.squared_signal;
  }
  FoldStats result;
  result.changed = static_cast<std::int64_t>(total.changed);
  if (total.squared_signal > 0.0) {
    result.relative_error = std::sqrt(total.squared_error / total.squared_signal);
  }
  if (result.relative_error > bound) {
    char sentence[128];
    std::snprintf(
        sentence, sizeof(sentence),
        "folding the scales would add a relative error of %.2e, more than the bound of %.2e",
        result.relative_error, bound);
    throw PrecisionLoss(sentence, result.relative_error);
  }
  return result;
}

}  // namespace zimage_mxfp8
