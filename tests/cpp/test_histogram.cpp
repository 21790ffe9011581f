#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "zimage_mxfp8/cpu_target.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/histogram.h"

using namespace zimage_mxfp8;

TEST_CASE("bit patterns are counted on every target, whatever the number of threads") {
  const std::int64_t rows = 2100, cols = 1001, stride = 1010;
  // Exactly as large as promised, so that the address sanitizer sees any element too many.
  std::vector<std::uint16_t> elements((rows - 1) * stride + cols);
  std::mt19937 generator(3);
  std::uniform_int_distribution<int> pattern(0, 65535);
  for (std::size_t i = 0; i < elements.size(); ++i) {
    elements[i] = static_cast<std::uint16_t>(i % 3 ? 0x3F80 : pattern(generator));
  }
  std::vector<std::uint64_t> expected(kBitPatterns, 5);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      ++expected[elements[static_cast<std::size_t>(row * stride + col)]];
    }
  }
  const ConstMatrixView view{elements.data(), DType::kBFloat16, rows, cols, stride};
  const CpuTarget before = active_cpu_target();
  for (const CpuTarget target : available_cpu_targets()) {
    CAPTURE(name(target));
    force_cpu_target(name(target));
    for (const int threads : {1, 3}) {
      std::vector<std::uint64_t> counts(kBitPatterns, 5);
      count_bit_patterns(view, counts.data(), threads);
      CHECK(counts == expected);
    }
  }
  force_cpu_target(name(before));
}

TEST_CASE("bit patterns of nothing, and arguments that are refused") {
  std::vector<std::uint64_t> counts(kBitPatterns);
  count_bit_patterns({nullptr, DType::kFloat16, 0, 7, 7}, counts.data());
  count_bit_patterns({nullptr, DType::kFloat16, 7, 0, 0}, counts.data());
  CHECK(counts == std::vector<std::uint64_t>(kBitPatterns));
  const std::vector<std::uint32_t> wide(4);
  CHECK_THROWS_AS(count_bit_patterns({wide.data(), DType::kFloat32, 2, 2, 2}, counts.data()),
                  InvalidArgument);
  CHECK_THROWS_AS(count_bit_patterns({nullptr, DType::kFloat16, 2, 2, 2}, counts.data()),
                  InvalidArgument);
  CHECK_THROWS_AS(count_bit_patterns({wide.data(), DType::kFloat16, 2, 2, 2}, nullptr),
                  InvalidArgument);
}
