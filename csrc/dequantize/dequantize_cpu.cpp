#include "cpu/block.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

void dequantize_rows(const DequantizeTask& task, int64_t row_begin, int64_t row_end) {
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    const int64_t blocks = ceil_div(task.cols, kBlock);
    const int64_t tiles = ceil_div(blocks, 4);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const uint8_t* codes = task.codes + row * blocks * kBlock;
      char* target = static_cast<char*>(task.target) +
                     row * task.row_stride * static_cast<int64_t>(sizeof(typename Type::Storage));
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t column = block * kBlock;
        const int64_t left = task.cols - column;
        uint32_t bits[kBlock];
        decode_block(codes + column, task.scales[scale_offset(row, block, tiles)], bits);
        store_block<Type>(bits, target, column, left < kBlock ? left : kBlock);
      }
    }
  });
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
