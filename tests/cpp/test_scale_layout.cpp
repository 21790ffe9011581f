#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"
#include "zimage_mxfp8/scale_layout.h"

using namespace zimage_mxfp8;

TEST_CASE("offsets are a permutation of the padded scales") {
  const std::int64_t rows = 256, cols = 12;
  std::vector<std::int64_t> offsets;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) offsets.push_back(scale_offset(r, c, cols / 4));
  }
  std::sort(offsets.begin(), offsets.end());
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    REQUIRE(offsets[i] == static_cast<std::int64_t>(i));
  }
}

TEST_CASE("offsets written out by hand") {
  CHECK(scale_offset(0, 0, 1) == 0);
  CHECK(scale_offset(0, 3, 1) == 3);
  CHECK(scale_offset(1, 0, 1) == 16);
  CHECK(scale_offset(31, 3, 1) == 499);
  CHECK(scale_offset(32, 0, 1) == 4);
  CHECK(scale_offset(127, 3, 1) == 511);
  CHECK(scale_offset(0, 4, 2) == 512);
  CHECK(scale_offset(128, 0, 2) == 1024);
}

TEST_CASE("there and back, with padding") {
  for (const std::int64_t rows : {1, 32, 77, 129}) {
    for (const std::int64_t cols : {1, 4, 9}) {
      std::vector<std::uint8_t> plain(static_cast<std::size_t>(rows * cols));
      for (std::size_t i = 0; i < plain.size(); ++i)
        plain[i] = static_cast<std::uint8_t>(i * 7 + 1);
      std::vector<std::uint8_t> blocked(
          static_cast<std::size_t>(round_up(rows, 128) * round_up(cols, 4)), 0xAA);
      std::vector<std::uint8_t> back(plain.size());
      to_blocked(plain.data(), rows, cols, blocked.data());
      from_blocked(blocked.data(), rows, cols, back.data());
      CHECK(back == plain);
      const auto padding = blocked.size() - plain.size();
      const auto zeros = std::count(plain.begin(), plain.end(), 0);
      CHECK(static_cast<std::size_t>(std::count(blocked.begin(), blocked.end(), 0)) ==
            padding + static_cast<std::size_t>(zeros));
    }
  }
  CHECK_THROWS_AS(to_blocked(nullptr, 1, 1, nullptr), InvalidArgument);
  CHECK_THROWS_AS(to_blocked(nullptr, -1, 1, nullptr), InvalidArgument);
}
