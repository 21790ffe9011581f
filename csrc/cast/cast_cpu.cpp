#include "cpu/block.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

void cast_row(const void* source, DType source_dtype, void* target, DType target_dtype,
              int64_t count) {
  with_type(source_dtype, [&](auto from) {
    with_type(target_dtype, [&](auto to) {
      for (int64_t column = 0; column < count; column += kBlock) {
        const int64_t left = count - column;
        const int64_t step = left < kBlock ? left : kBlock;
        uint32_t bits[kBlock];
        load_block<decltype(from)>(source, column, step, bits);
        store_block<decltype(to)>(bits, target, column, step);
      }
    });
  });
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
