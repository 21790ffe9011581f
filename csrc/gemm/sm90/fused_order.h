// The tiles of the kernels fp8_sm90 and int8_sm90, and their order. For the host and for devices.
#pragma once

#include <cstdint>

namespace zimage_mxfp8::detail {

// Tiles: tokens, which are rows of A, and rows of B. Two blocks are a cluster.
inline constexpr int kFusedTileM = 128, kFusedTileN = 256, kFusedCluster = 2;

// What a block computes at a time.
struct FusedTile {
  int m;               // row of tiles: 128 tokens
  int n;               // column of tiles; beyond the last one there is nothing to compute
  bool shares_tokens;  // with the other block, which has another column; or else the column
  bool is_half;        // 64 tokens: the block computes two tiles, columns n and n + 1
};

// The order of the units of a GEMM. A cluster computes a unit at a time:
// - two rows of tiles of a column, one for each block;
// - of a last row without another one two columns, one for each block;
// - of 64 tokens after that row, if `ends_half`, four columns, two for each block.
struct FusedOrder {
  int m_tiles, n_tiles;
  bool ends_half;

  // Columns that all tokens are multiplied with before the next ones: they stay in the cache.
  static constexpr int kGroupColumns = 8;

  constexpr std::int64_t units() const { return units_of(n_tiles); }

  // Returns the tile of a block, 0 or 1, of the cluster that computes a unit.
  constexpr FusedTile at(int unit, int block) const {
    const int group_units = static_cast<int>(units_of(kGroupColumns));
    const int group = unit / group_units, first = group * kGroupColumns;
    const int left = n_tiles - first, columns = left < kGroupColumns ? left : kGroupColumns;
    // Halves take longer than other units. Their place differs from group to group, so that they
    // are not all of one cluster.
    const int halves = halves_of(columns), others = static_cast<int>(units_of(columns)) - halves;
    const int halves_begin = group * halves_of(kGroupColumns) % (others + 1);
    int in_group = unit % group_units;
    if (in_group >= halves_begin && in_group < halves_begin + halves) {
      const int pair = (in_group - halves_begin) * kFusedCluster + block;
      return {whole_rows(), first + pair * 2, true, true};
    }
    if (in_group >= halves_begin) in_group -= halves;
    const int of_last_row = in_group - row_pairs() * columns;
    if (of_last_row >= 0) {
      return {whole_rows() - 1, first + of_last_row * kFusedCluster + block, true, false};
    }
    return {in_group / columns * kFusedCluster + block, first + in_group % columns, false, false};
  }

 private:
  constexpr int whole_rows() const { return m_tiles - (ends_half ? 1 : 0); }
  constexpr int row_pairs() const { return whole_rows() / kFusedCluster; }
  constexpr int halves_of(int columns) const { return ends_half ? (columns + 3) / 4 : 0; }
  constexpr std::int64_t units_of(int columns) const {
    const int of_last_row = whole_rows() % kFusedCluster == 0 ? 0 : (columns + 1) / kFusedCluster;
    return std::int64_t{row_pairs()} * columns + of_last_row + halves_of(columns);
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
