// Splits work over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace zimage_mxfp8::detail {

// Number of threads that 0 means: the processors that this process may use, at least 1.
int default_threads();

// Calls body(begin, end) for ranges that cover [0, count), on up to `threads` threads (0:
// default_threads(); the calling thread is one of them). `grain` is the smallest range worth a
// thread. Rethrows the first exception of a body. Throws InvalidArgument if `threads` < 0.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

// Rows that make a range worth a thread of its own (about 50 us of work).
inline std::int64_t row_grain(std::int64_t cols) { return 65536 / (cols > 0 ? cols : 1) + 1; }

}  // namespace zimage_mxfp8::detail
