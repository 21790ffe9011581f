#include <string.h>

#include "kernels.h"

namespace zimage_mxfp8::detail::ZM_TARGET {

// Neighbours count in different tables: a counter that was just written would have to be waited
// for, and weights have few patterns, so that neighbours are often equal.
void count_bit_patterns(const void* elements, int64_t count, uint32_t* counts) {
  static_assert(kSubHistograms == 4, "one for each 16-bit element of a 64-bit word");
  constexpr int64_t kPatterns = 65536;
  const char* bytes = static_cast<const char*>(elements);
  uint32_t* const first = counts;
  uint32_t* const second = counts + kPatterns;
  uint32_t* const third = counts + 2 * kPatterns;
  uint32_t* const fourth = counts + 3 * kPatterns;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint64_t word;
    memcpy(&word, bytes + 2 * i, 8);
    ++first[word & 0xFFFF];
    ++second[(word >> 16) & 0xFFFF];
    ++third[(word >> 32) & 0xFFFF];
    ++fourth[word >> 48];
  }
  for (; i < count; ++i) {
    uint16_t pattern;
    memcpy(&pattern, bytes + 2 * i, 2);
    ++first[pattern];
  }
}

}  // namespace zimage_mxfp8::detail::ZM_TARGET
