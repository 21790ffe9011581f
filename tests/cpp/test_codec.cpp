#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "reference.h"
#include "zimage_mxfp8/cast.h"
#include "zimage_mxfp8/cpu_target.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/residual.h"
#include "zimage_mxfp8/scale_layout.h"

using namespace zimage_mxfp8;

namespace {

struct Encoded {
  explicit Encoded(std::int64_t rows, std::int64_t cols)
      : shape{rows, cols},
        // Exactly as large as promised, so that the address sanitizer sees any byte too many.
        codes(static_cast<std::size_t>(shape.code_bytes()), 0xAA),
        scales(static_cast<std::size_t>(shape.scale_bytes()), 0xAA) {}

  MXFP8View view() { return {codes.data(), scales.data(), shape.rows, shape.cols}; }
  ConstMXFP8View const_view() const {
    return {codes.data(), scales.data(), shape.rows, shape.cols};
  }

  MXFP8Shape shape;
  std::vector<std::uint8_t> codes, scales;
};

std::vector<float> random_matrix(std::int64_t rows, std::int64_t cols, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.f, 1.f);
  std::uniform_real_distribution<float> exponent(-20.f, 20.f);
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (float& v : values) v = normal(generator) * std::exp2(exponent(generator));
  return values;
}

ConstMatrixView view(const std::vector<float>& m, std::int64_t rows, std::int64_t cols) {
  return {m.data(), DType::kFloat32, rows, cols, cols};
}

template <typename Test>
void on_every_target(Test test) {
  const CpuTarget before = active_cpu_target();
  for (const CpuTarget target : available_cpu_targets()) {
    CAPTURE(name(target));
    force_cpu_target(name(target));
    test();
  }
  force_cpu_target(name(before));
}

const std::pair<std::int64_t, std::int64_t> kShapes[] = {{1, 1},    {3, 31},    {32, 32}, {33, 50},
                                                         {128, 96}, {129, 641}, {300, 33}};

}  // namespace

TEST_CASE("codes, scales and padding equal the scalar reference") {
  for (const auto& [rows, cols] : kShapes) {
    CAPTURE(rows);
    CAPTURE(cols);
    const auto matrix = random_matrix(rows, cols, static_cast<unsigned>(rows));
    on_every_target([&, rows = rows, cols = cols] {
      Encoded encoded(rows, cols);
      quantize(view(matrix, rows, cols), encoded.view());
      std::vector<std::uint8_t> want_scales(encoded.scales.size(), 0);
      std::vector<std::uint8_t> want_codes(encoded.codes.size(), 0);
      const std::int64_t blocks = encoded.shape.blocks();
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t b = 0; b < blocks; ++b) {
          std::vector<double> values;
          for (std::int64_t c = b * 32; c < std::min(cols, b * 32 + 32); ++c) {
            values.push_back(matrix[static_cast<std::size_t>(r * cols + c)]);
          }
          const reference::Block block = reference::encode(values);
          want_scales[static_cast<std::size_t>(scale_offset(r, b, ceil_div(blocks, 4)))] =
              static_cast<std::uint8_t>(block.byte);
          for (std::size_t i = 0; i < values.size(); ++i) {
            want_codes[static_cast<std::size_t>(r * encoded.shape.code_cols() + b * 32) + i] =
                static_cast<std::uint8_t>(block.codes[i]);
          }
        }
      }
      CHECK(encoded.codes == want_codes);
      CHECK(encoded.scales == want_scales);
    });
  }
}

TEST_CASE("decoding equals the scalar reference, residuals follow from it") {
  for (const auto& [rows, cols] : kShapes) {
    const auto matrix = random_matrix(rows, cols, 7);
    on_every_target([&, rows = rows, cols = cols] {
      Encoded encoded(rows, cols);
      quantize(view(matrix, rows, cols), encoded.view());
      std::vector<float> decoded(matrix.size(), -1.f);
      dequantize(encoded.const_view(), {decoded.data(), DType::kFloat32, rows, cols, cols});
      const std::int64_t tiles = ceil_div(encoded.shape.blocks(), 4);
      double error = 0, signal = 0, worst = 0;
      std::vector<double> x(static_cast<std::size_t>(cols)), out(static_cast<std::size_t>(rows));
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<double>(i));
      std::vector<double> want(out.size(), 0.0);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
          const auto i = static_cast<std::size_t>(r * cols + c);
          const int code =
              encoded.codes[static_cast<std::size_t>(r * encoded.shape.code_cols() + c)];
          const int byte = encoded.scales[static_cast<std::size_t>(scale_offset(r, c / 32, tiles))];
          REQUIRE(decoded[i] == std::ldexp(reference::e4m3(code), byte - 127));
          const double difference = static_cast<double>(matrix[i]) - decoded[i];
          error += difference * difference;
          signal += static_cast<double>(matrix[i]) * matrix[i];
          worst = std::fmax(worst, std::fabs(difference));
          want[static_cast<std::size_t>(r)] += difference * x[static_cast<std::size_t>(c)];
        }
      }
      const ResidualStats stats = measure_residual(view(matrix, rows, cols), encoded.const_view());
      CHECK(stats.squared_error == doctest::Approx(error).epsilon(1e-12));
      CHECK(stats.squared_signal == doctest::Approx(signal).epsilon(1e-12));
      CHECK(stats.max_error == worst);
      residual_times_vector(view(matrix, rows, cols), encoded.const_view(), x.data(), out.data());
      for (std::size_t r = 0; r < out.size(); ++r) CHECK(out[r] == doctest::Approx(want[r]));
    });
  }
}

TEST_CASE("rows may be apart, and unaligned") {
  const auto matrix = random_matrix(40, 100, 3);
  on_every_target([&] {
    Encoded whole(40, 50), strided(40, 50);
    std::vector<float> packed;
    for (int r = 0; r < 40; ++r) {
      packed.insert(packed.end(), matrix.begin() + r * 100, matrix.begin() + r * 100 + 50);
    }
    quantize(view(packed, 40, 50), whole.view());
    std::vector<unsigned char> bytes(matrix.size() * 4 + 1);
    std::memcpy(bytes.data() + 1, matrix.data(), matrix.size() * 4);
    quantize({bytes.data() + 1, DType::kFloat32, 40, 50, 100}, strided.view());
    CHECK(strided.codes == whole.codes);
    CHECK(strided.scales == whole.scales);
  });
}

TEST_CASE("casts are exact where they can be, and rounded to nearest even elsewhere") {
  on_every_target([] {
    std::vector<std::uint16_t> all(65536), back(65536);
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
    for (const DType type : {DType::kBFloat16, DType::kFloat16}) {
      std::vector<float> wide(all.size());
      cast({all.data(), type, 1, 65536, 65536}, {wide.data(), DType::kFloat32, 1, 65536, 65536});
      cast({wide.data(), DType::kFloat32, 1, 65536, 65536}, {back.data(), type, 1, 65536, 65536});
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (std::isnan(wide[i])) continue;
        REQUIRE(back[i] == all[i]);
      }
    }
    const float ties[] = {1.00390625f, 1.01171875f};  // halfway between two bfloat16 values
    std::uint16_t rounded[2];
    cast({ties, DType::kFloat32, 1, 2, 2}, {rounded, DType::kBFloat16, 1, 2, 2});
    CHECK(rounded[0] == 0x3F80);
    CHECK(rounded[1] == 0x3F82);
  });
}

TEST_CASE("NaN and infinity are found where they are") {
  on_every_target([] {
    for (const float bad : {std::nanf(""), -std::numeric_limits<float>::infinity()}) {
      std::vector<float> matrix(200 * 77, 1.f);
      CHECK_FALSE(find_nonfinite(view(matrix, 200, 77)));
      matrix[150 * 77 + 76] = matrix[151 * 77] = bad;
      Encoded encoded(200, 77);
      for (const int threads : {1, 3}) {
        try {
          quantize(view(matrix, 200, 77), encoded.view(), threads);
          FAIL("no exception");
        } catch (const NonFiniteValue& error) {
          CHECK(error.row() == 150);
          CHECK(error.column() == 76);
        }
      }
    }
  });
}

TEST_CASE("misuse throws InvalidArgument") {
  std::vector<float> matrix(64 * 64);
  Encoded encoded(64, 64);
  const ConstMatrixView good = view(matrix, 64, 64);
  ConstMatrixView bad = good;
  bad.rows = -1;
  CHECK_THROWS_AS(quantize(bad, encoded.view()), InvalidArgument);
  bad = good;
  bad.row_stride = 63;
  CHECK_THROWS_AS(quantize(bad, encoded.view()), InvalidArgument);
  bad = good;
  bad.data = nullptr;
  CHECK_THROWS_AS(quantize(bad, encoded.view()), InvalidArgument);
  bad = good;
  bad.cols = 32;
  CHECK_THROWS_AS(quantize(bad, encoded.view()), InvalidArgument);
  MXFP8View no_scales = encoded.view();
  no_scales.scales = nullptr;
  CHECK_THROWS_AS(quantize(good, no_scales), InvalidArgument);
  CHECK_THROWS_AS(quantize(good, encoded.view(), -1), InvalidArgument);
  CHECK_THROWS_AS(dequantize(encoded.const_view(), {nullptr, DType::kFloat32, 64, 64, 64}),
                  InvalidArgument);
  CHECK_THROWS_AS(residual_times_vector(good, encoded.const_view(), nullptr, nullptr),
                  InvalidArgument);
  CHECK_THROWS_AS(cast(good, {matrix.data(), DType::kFloat32, 64, 32, 32}), InvalidArgument);
  CHECK_NOTHROW(quantize({nullptr, DType::kFloat32, 0, 0, 0}, {nullptr, nullptr, 0, 0}));
}
