// The order in which persistent clusters of blocks compute the tiles of a matrix.
#pragma once

namespace zimage_mxfp8::detail {

// Row and column of a tile, counted in tiles, and the group of columns that it belongs to.
struct TileIndex {
  int m, n;
  int group;
};

// Column after column of tiles.
struct ColumnOrder {
  int m_tiles, n_tiles;

  __device__ int tiles() const { return m_tiles * n_tiles; }
  __device__ TileIndex at(int index) const {
    return {index % m_tiles, index / m_tiles, index / m_tiles};
  }
};

// Groups of `group_columns` columns of tiles, each group row after row: the operand that belongs to
// the columns stays in the cache while the other one streams through.
struct GroupedOrder {
  int m_tiles, n_tiles;
  int group_columns;

  __device__ int tiles() const { return n_tiles * m_tiles; }
  __device__ TileIndex at(int index) const {
    const int group_tiles = group_columns * m_tiles;
    const int group = index / group_tiles, in_group = index % group_tiles;
    const int first = group * group_columns, across = min(group_columns, n_tiles - first);
    return {in_group / across, first + in_group % across, group};
  }
};

// The tiles that a cluster computes, one after the other: `for (const auto at : scheduler)`.
template <class Order, int cluster_blocks>
class TileScheduler {
 public:
  explicit __device__ TileScheduler(const Order& order)
      : order_(order),
        tiles_(order.tiles()),
        first_(blockIdx.x / cluster_blocks),
        step_(gridDim.x / cluster_blocks) {}

  struct End {
    int tiles;
  };
  struct Iterator {
    const Order& order;
    int index, step;

    __device__ auto operator*() const { return order.at(index); }
    __device__ void operator++() { index += step; }
    __device__ bool operator!=(const End& end) const { return index < end.tiles; }
  };

  __device__ Iterator begin() const { return {order_, first_, step_}; }
  __device__ End end() const { return {tiles_}; }

 private:
  const Order order_;
  const int tiles_, first_, step_;
};

}  // namespace zimage_mxfp8::detail
