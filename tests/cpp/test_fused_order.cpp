// The order of the tiles of Hopper's fused GEMMs.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "gemm/sm90/fused_order.h"

using namespace zimage_mxfp8::detail;

namespace {

constexpr int kHalfTokens = kFusedTileM / 2;

// How often 64 tokens of a column of tiles are computed, by their place.
std::map<std::pair<int, int>, int> computed(const FusedOrder& order) {
  std::map<std::pair<int, int>, int> times;
  for (int unit = 0; unit < order.units(); ++unit) {
    for (int block = 0; block < kFusedCluster; ++block) {
      const FusedTile tile = order.at(unit, block);
      ++times[{2 * tile.m, tile.n}];
      ++times[tile.is_half ? std::pair{2 * tile.m, tile.n + 1} : std::pair{2 * tile.m + 1, tile.n}];
    }
  }
  return times;
}

}  // namespace

TEST_CASE("every tile is computed once") {
  for (const int m : {1, 64, 65, 129, 192, 300, 576, 1088, 2112, 2176}) {
    for (int n_tiles = 1; n_tiles < 20; ++n_tiles) {
      const int m_tiles = (m + kFusedTileM - 1) / kFusedTileM;
      for (const bool ends_half : {false, true}) {
        if (ends_half && (m - 1) % kFusedTileM >= kHalfTokens) continue;
        CAPTURE(m);
        CAPTURE(n_tiles);
        CAPTURE(ends_half);
        const auto times = computed({m_tiles, n_tiles, ends_half});
        bool once = true;
        for (int half = 0; half * kHalfTokens < m; ++half) {
          for (int n = 0; n < n_tiles; ++n) {
            const auto found = times.find({half, n});
            once = once && found != times.end() && found->second == 1;
          }
        }
        CHECK(once);
      }
    }
  }
}

TEST_CASE("blocks share either tokens or a column") {
  for (const FusedOrder order : {FusedOrder{17, 80, true}, FusedOrder{17, 45, false}}) {
    for (int unit = 0; unit < order.units(); ++unit) {
      const FusedTile one = order.at(unit, 0), other = order.at(unit, 1);
      CHECK(one.shares_tokens == other.shares_tokens);
      CHECK(one.is_half == other.is_half);
      CHECK((one.m == other.m) == one.shares_tokens);
      CHECK((one.n == other.n) != one.shares_tokens);
    }
  }
}

TEST_CASE("half tiles are taken where they save a wave") {
  // 66 clusters. 2,112 tokens are 16.5 tiles: of 80 columns 8 x 80 pairs and 40 of the last row
  // in 11 waves, or 8 x 80 and 20 units of halves in 10; of 15 columns 8 x 15 + 8 in 2 waves.
  const FusedOrder order = fused_order(2112, 80, 66);
  CHECK(order.ends_half);
  CHECK(order.units() == 660);
  CHECK(!fused_order(2112, 15, 66).ends_half);
  CHECK(fused_order(2112, 15, 66).units() == 128);
  CHECK(!fused_order(2113, 80, 66).ends_half);
  CHECK(fused_order(2113, 80, 66).units() == 680);
}

TEST_CASE("the shapes that the GPU tests take for halves") {
  const auto ends_half = [](int m, int columns) { return fused_order(m, columns, 66).ends_half; };
  CHECK(ends_half(576, 80));   // w1 and w3
  CHECK(ends_half(1088, 45));  // q, k and v
  CHECK(ends_half(1088, 60));  // the same in tiles of 192
  CHECK(ends_half(1088, 15));  // q
  CHECK(ends_half(192, 80));
  CHECK(ends_half(320, 45));
}

TEST_CASE("no cluster has two units of halves") {
  int orders = 0;
  for (const int clusters : {57, 66, 74}) {
    for (int m = 64; m < 9000; m += 128) {
      for (int n_tiles = 1; n_tiles < 90; n_tiles += 1) {
        const FusedOrder order = fused_order(m, n_tiles, clusters);
        if (!order.ends_half) continue;
        ++orders;
        std::vector<int> of_cluster(clusters);
        int found = 0;
        for (int unit = 0; unit < order.units(); ++unit) {
          const bool is_half = order.at(unit, 0).is_half;
          found += is_half ? 1 : 0;
          of_cluster[unit % clusters] += is_half ? 1 : 0;
        }
        REQUIRE(found == order.half_units());
        REQUIRE(*std::max_element(of_cluster.begin(), of_cluster.end()) == 1);
      }
    }
  }
  CHECK(orders > 100);
}
