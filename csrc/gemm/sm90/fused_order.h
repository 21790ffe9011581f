// The tiles of the kernels fp8_sm90 and int8_sm90, and their order. For the host and for devices.
#pragma once

#include <cstdint>

namespace zimage_mxfp8::detail {

// Tiles: tokens, which are rows of A, and rows of B. Two blocks are a cluster.
inline constexpr int kFusedTileM = 128, kFusedTileN = 256, kFusedCluster = 2;

// What a block computes at a time.
struct FusedTile {
  int m;  // row of tiles: 128 tokens
  int n;  // column of tiles; beyond the last one there is nothing to compute
  // Whether the blocks have the same tokens and different columns; otherwise they have the same
  // column and different tokens.
  bool shares_tokens;
  bool is_half;  // 64 tokens: the block computes two tiles, columns n and n + 1
};

// The order of the units of a GEMM. A cluster computes a unit at a time:
// - two rows of tiles of a column, one for each block;
// - two columns of the last row, one for each block, where the number of whole rows is odd;
// - four columns of the last 64 tokens, two for each block, if `ends_half`: a unit of halves.
struct FusedOrder {
  int m_tiles, n_tiles;
  bool ends_half;

  // Columns that all tokens are multiplied with before the next ones: they stay in the cache.
  static constexpr int kGroupColumns = 8;

  constexpr std::int64_t units() const { return units_of(n_tiles); }
  constexpr std::int64_t waves(std::int64_t clusters) const {
    return (units() + clusters - 1) / clusters;
  }

  // Returns the tile of a block, 0 or 1, of the cluster that computes a unit.
  constexpr FusedTile at(int unit, int block) const {
    const int group_units = static_cast<int>(units_of(kGroupColumns));
    const int group = unit / group_units, first = group * kGroupColumns;
    const int columns = columns_of(group), halves = halves_of(columns);
    int in_group = unit % group_units;
    const int of_halves = in_group - halves_begin(group);
    if (of_halves >= 0 && of_halves < halves) {
      return {whole_rows(), first + (of_halves * kFusedCluster + block) * 2, true, true};
    }
    if (of_halves >= 0) in_group -= halves;
    const int of_last_row = in_group - row_pairs() * columns;
    if (of_last_row >= 0) {
      return {whole_rows() - 1, first + of_last_row * kFusedCluster + block, true, false};
    }
    return {in_group / columns * kFusedCluster + block, first + in_group % columns, false, false};
  }

  // The number of units of halves, and the unit that the i-th of them is.
  constexpr int half_units() const { return halves_of(n_tiles); }
  constexpr std::int64_t half_unit(int i) const {
    const int of_group = halves_of(kGroupColumns), group = i / of_group;
    return group * units_of(kGroupColumns) + halves_begin(group) + i % of_group;
  }

 private:
  constexpr int whole_rows() const { return m_tiles - (ends_half ? 1 : 0); }
  constexpr int row_pairs() const { return whole_rows() / kFusedCluster; }
  constexpr int columns_of(int group) const {
    const int left = n_tiles - group * kGroupColumns;
    return left < kGroupColumns ? left : kGroupColumns;
  }
  constexpr int halves_of(int columns) const { return ends_half ? (columns + 3) / 4 : 0; }
  constexpr std::int64_t units_of(int columns) const {
    const int of_last_row = whole_rows() % kFusedCluster == 0 ? 0 : (columns + 1) / kFusedCluster;
    return std::int64_t{row_pairs()} * columns + of_last_row + halves_of(columns);
  }
  // Where the units of halves begin in a group of columns: not always at the same place, because
  // they take longer than others and should not all be of one cluster.
  constexpr int halves_begin(int group) const {
    const int columns = columns_of(group);
    const int others = static_cast<int>(units_of(columns)) - halves_of(columns);
    return group * halves_of(kGroupColumns) % (others + 1);
  }
};

// Returns whether no cluster has two units of halves.
constexpr bool halves_are_spread(const FusedOrder& order, std::int64_t clusters) {
  if (order.half_units() > clusters) return false;
  for (int i = 0; i < order.half_units(); ++i) {
    for (int other = 0; other < i; ++other) {
      if ((order.half_unit(i) - order.half_unit(other)) % clusters == 0) return false;
    }
  }
  return true;
}

// Returns the order of a GEMM with `m` tokens. It ends with halves if that takes fewer waves of
// clusters: a unit of halves takes as long as two others at most.
constexpr FusedOrder fused_order(std::int64_t m, std::int64_t n_tiles, std::int64_t clusters) {
  const int m_tiles = static_cast<int>((m + kFusedTileM - 1) / kFusedTileM);
  const FusedOrder whole{m_tiles, static_cast<int>(n_tiles), false};
  const FusedOrder halves{m_tiles, static_cast<int>(n_tiles), true};
  const bool can_end_half = (m - 1) % kFusedTileM < kFusedTileM / 2;
  const bool ends_half = can_end_half && halves.waves(clusters) < whole.waves(clusters) &&
                         halves_are_spread(halves, clusters);
  return ends_half ? halves : whole;
}

}  // namespace zimage_mxfp8::detail
