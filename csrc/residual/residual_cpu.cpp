#include "cpu/block.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

namespace {

// Partial sums that are added in one fixed order on every target.
constexpr int kLanes = 16;

double sum_lanes(const double (&lanes)[kLanes]) {
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Calls visit(column, w, wq) for each block of `row`, both as float32 bit patterns.
template <typename Type, typename Visit>
void for_each_block(const ResidualTask& task, int64_t row, Visit visit) {
  const int64_t blocks = ceil_div(task.cols, kBlock);
  const int64_t tiles = ceil_div(blocks, 4);
  const uint8_t* codes = task.codes + row * blocks * kBlock;
  const char* original =
      static_cast<const char*>(task.original) +
      row * task.row_stride * static_cast<int64_t>(sizeof(typename Type::Storage));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t column = block * kBlock;
    const int64_t left = task.cols - column;
    uint32_t w[kBlock], wq[kBlock];
    load_block<Type>(original, column, left < kBlock ? left : kBlock, w);
    decode_block(codes + column, task.scales[scale_offset(row, block, tiles)], wq);
    visit(column, w, wq);
  }
}

}  // namespace

ResidualSums residual_sums(const ResidualTask& task, int64_t row_begin, int64_t row_end) {
  return with_type(task.dtype, [&](auto type) {
    double error[kLanes] = {}, signal[kLanes] = {}, worst[kLanes] = {};
    for (int64_t row = row_begin; row < row_end; ++row) {
      for_each_block<decltype(type)>(
          task, row, [&](int64_t, const uint32_t (&w)[kBlock], const uint32_t (&wq)[kBlock]) {
            for (int half = 0; half < kBlock; half += kLanes) {
              for (int i = 0; i < kLanes; ++i) {
                const double value = as_float(w[half + i]);
                const double residual = value - static_cast<double>(as_float(wq[half + i]));
                const double size = residual < 0 ? -residual : residual;
                error[i] += residual * residual;
                signal[i] += value * value;
                worst[i] = size > worst[i] ? size : worst[i];
              }
            }
          });
    }
    ResidualSums sums{sum_lanes(error), sum_lanes(signal), 0.0};
    for (double w : worst) sums.max_error = w > sums.max_error ? w : sums.max_error;
    return sums;
  });
}

void residual_dot(const ResidualTask& task, const double* x, double* out, int64_t row_begin,
                  int64_t row_end) {
  with_type(task.dtype, [&](auto type) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      double lanes[kLanes] = {};
      for_each_block<decltype(type)>(
          task, row,
          [&](int64_t column, const uint32_t (&w)[kBlock], const uint32_t (&wq)[kBlock]) {
            double factor[kBlock] = {};
            const int64_t left = task.cols - column;
            memcpy(factor, x + column,
                   static_cast<size_t>(left < kBlock ? left : kBlock) * sizeof(double));
            for (int half = 0; half < kBlock; half += kLanes) {
              for (int i = 0; i < kLanes; ++i) {
                const double residual = static_cast<double>(as_float(w[half + i])) -
                                        static_cast<double>(as_float(wq[half + i]));
                lanes[i] += residual * factor[half + i];
              }
            }
          });
      out[row] = sum_lanes(lanes);
    }
  });
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
