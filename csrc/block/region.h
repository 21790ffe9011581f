// Device memory that is taken in parts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

inline constexpr std::int64_t kRegionAlignment = 256;  // bytes, of the memory and of every part

// Parts of memory, taken one after another. Without a begin it only counts.
class Region {
 public:
  explicit Region(void* begin = nullptr) : begin_(static_cast<char*>(begin)) {}

  void* take(std::int64_t bytes) {
    const std::int64_t at = used_;
    used_ += round_up(bytes, kRegionAlignment);
    peak_ = std::max(peak_, used_);
    return begin_ ? begin_ + at : nullptr;
  }
  std::int64_t used() const { return used_; }
  std::int64_t peak() const { return peak_; }
  // Gives back what was taken since used() was this.
  void back_to(std::int64_t used) { used_ = used; }

 private:
  char* begin_;
  std::int64_t used_ = 0, peak_ = 0;
};

}  // namespace zimage_mxfp8::detail
