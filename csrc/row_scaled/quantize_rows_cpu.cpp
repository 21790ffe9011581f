#include "cpu/block.h"
#include "cpu/kernels.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

void quantize_rows(const QuantizeRowsTask& task, int64_t row_begin, int64_t row_end) {
  with_type(task.dtype, [&](auto type) {
    using Type = decltype(type);
    using Storage = typename Type::Storage;
    const auto for_blocks = [&](int64_t row, auto function) {
      const void* source = static_cast<const char*>(task.source) +
                           row * task.row_stride * static_cast<int64_t>(sizeof(Storage));
      for (int64_t column = 0; column < task.cols; column += kBlock) {
        const int64_t left = task.cols - column, count = left < kBlock ? left : kBlock;
        Storage raw[kBlock];
        load_raw<Type>(source, column, count, raw);
        function(raw, task.codes + row * task.cols + column, static_cast<size_t>(count));
      }
    };
    for (int64_t row = row_begin; row < row_end; ++row) {
      int32_t amax = 0;
      for_blocks(row, [&](const Storage* raw, uint8_t*, size_t) {
        const int32_t maximum = block_maximum<Type>(raw);
        amax = maximum > amax ? maximum : amax;
      });
      const float maximum = as_float(static_cast<uint32_t>(amax));
      const bool finite = amax < kInfinityBits;
      const bool zero = finite && maximum < kSmallestRowMaximum;
      task.scales[row] = !finite ? as_float(0x7FC00000) : zero ? 0.0f : maximum / 448.0f;
      const float factor = 448.0f / maximum;
      for_blocks(row, [&](const Storage* raw, uint8_t* codes, size_t count) {
        if (!finite || zero) {
          memset(codes, finite ? 0 : 0x7F, count);
        } else {
          uint8_t encoded[kBlock];
          encode_scaled<Type>(raw, factor, encoded);
          memcpy(codes, encoded, count);
        }
      });
    }
  });
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
