// The tiles of the kernels fp8_sm90 and int8_sm90, and their order. For the host and for devices.
#pragma once

#include <cstdint>

namespace zimage_mxfp8::detail {

// Tiles: tokens, which are rows of A, and rows of B. Two blocks are a cluster.
inline constexpr int kFusedTileM = 128, kFusedTileN = 256, kFusedCluster = 2;

// What a block computes at a time.
struct FusedTile {
  int m;               // row of tiles: 128 tokens
  int n;               // column of tiles
  bool shares_tokens;  // with the other block, which has another column
  // Of 64 tokens: the block computes two tiles, columns n and n + 1. The latter may not exist, nor
  // n. The other block shares the tokens.
  bool is_half;
};

// The order of the units of a GEMM. A cluster computes a unit at a time:
// - two columns of tiles of a row, one for each block;
// - of an odd last column two rows, one for each block; the second may not exist;
// - of a last row with 64 tokens or fewer four columns, two for each block, if `ends_half`.
struct FusedOrder {
  int m_tiles, n_tiles;
  bool ends_half;

  // Pairs of columns that all tokens are multiplied with before the next ones: they stay in the
  // cache.
  static constexpr int kGroupPairs = 4;

  constexpr std::int64_t units() const {
    return units_of(n_tiles / 2) + n_tiles % 2 * ((m_tiles + 1) / kFusedCluster);
  }

  // Returns the tile of a block, 0 or 1, of the cluster that computes a unit.
  constexpr FusedTile at(int unit, int block) const {
    const int of_last_column = unit - static_cast<int>(units_of(n_tiles / 2));
    if (of_last_column >= 0) {
      return {of_last_column * kFusedCluster + block, n_tiles - 1, false, false};
    }
    const int group_units = static_cast<int>(units_of(kGroupPairs));
    const int group = unit / group_units, first_pair = group * kGroupPairs;
    const int left = n_tiles / 2 - first_pair, pairs = left < kGroupPairs ? left : kGroupPairs;
    // Halves take longer than other units. Their place differs from group to group, so that they
    // are not all of one cluster.
    const int halves = halves_of(pairs), others = pairs * whole_rows();
    const int halves_begin = group * halves_of(kGroupPairs) % (others + 1);
    int in_group = unit % group_units;
    if (in_group >= halves_begin && in_group < halves_begin + halves) {
      const int pair = first_pair + (in_group - halves_begin) * 2 + block;
      return {whole_rows(), pair < n_tiles / 2 ? pair * 2 : n_tiles, true, true};
    }
    if (in_group >= halves_begin) in_group -= halves;
    return {in_group / pairs, (first_pair + in_group % pairs) * 2 + block, true, false};
  }

 private:
  constexpr int whole_rows() const { return m_tiles - (ends_half ? 1 : 0); }
  constexpr int halves_of(int pairs) const { return ends_half ? (pairs + 1) / 2 : 0; }
  constexpr std::int64_t units_of(int pairs) const {
    return std::int64_t{pairs} * whole_rows() + halves_of(pairs);
  }
};

// Returns the order of a GEMM with `m` tokens that takes fewer waves of clusters.
constexpr FusedOrder fused_order(std::int64_t m, std::int64_t n_tiles, std::int64_t clusters) {
  const int m_tiles = static_cast<int>((m + kFusedTileM - 1) / kFusedTileM);
  const FusedOrder whole{m_tiles, static_cast<int>(n_tiles), false};
  const FusedOrder halves{m_tiles, static_cast<int>(n_tiles), true};
  const bool can_end_half = (m - 1) % kFusedTileM < kFusedTileM / 2;
  const auto waves = [&](const FusedOrder& order) {
    return (order.units() + clusters - 1) / clusters;
  };
  return can_end_half && waves(halves) < waves(whole) ? halves : whole;
}

}  // namespace zimage_mxfp8::detail
