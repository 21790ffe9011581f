#include "zimage_mxfp8/histogram.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace zimage_mxfp8 {
namespace {

// Number of elements from which a table per thread is worth clearing and adding up.
constexpr std::int64_t kGrain = std::int64_t{1} << 20;
// Elements after which a 32-bit counter could be full.
constexpr std::int64_t kMaxCounted = std::int64_t{1} << 31;

// Tables of one thread, in 32 bits so that more of them stay in the fastest cache.
class Tables {
 public:
  Tables() : counts_(detail::kSubHistograms * kBitPatterns) {}

  void count(const char* row, std::int64_t elements, std::vector<std::uint64_t>& total) {
    for (std::int64_t done = 0; done < elements;) {
      if (pending_ == kMaxCounted) flush(total);
      const std::int64_t step = std::min(elements - done, kMaxCounted - pending_);
      detail::active_kernels().count_bit_patterns(row + 2 * done, step, counts_.data());
      pending_ += step;
      done += step;
    }
  }

  void flush(std::vector<std::uint64_t>& total) {
    for (std::size_t i = 0; i < counts_.size(); ++i) total[i % kBitPatterns] += counts_[i];
    std::fill(counts_.begin(), counts_.end(), 0);
    pending_ = 0;
  }

 private:
  std::vector<std::uint32_t> counts_;
  std::int64_t pending_ = 0;
};

}  // namespace

void count_bit_patterns(const ConstMatrixView& matrix, std::uint64_t* counts, int threads) {
  detail::check_matrix(matrix, "the matrix");
  if (element_size(matrix.dtype) != 2) {
    throw InvalidArgument("bit patterns can be counted for 16-bit elements only, not for float32");
  }
  if (!counts) throw InvalidArgument("counts is a null pointer");
  if (matrix.cols == 0) return;
  std::mutex mutex;
  detail::parallel_for(matrix.rows, std::max<std::int64_t>(kGrain / matrix.cols, 1), threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         Tables tables;
                         std::vector<std::uint64_t> total(kBitPatterns);
                         for (std::int64_t row = begin; row < end; ++row) {
                           const auto* data = static_cast<const char*>(matrix.data);
                           tables.count(data + 2 * row * matrix.row_stride, matrix.cols, total);
                         }
                         tables.flush(total);
                         const std::lock_guard<std::mutex> lock(mutex);
                         for (std::int64_t i = 0; i < kBitPatterns; ++i) {
                           counts[i] += total[static_cast<std::size_t>(i)];
                         }
                       });
}

}  // namespace zimage_mxfp8
