#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/matrix.h"

#ifdef __linux__
#include <sched.h>
#endif

namespace zimage_mxfp8::detail {

int default_threads() {
#ifdef __linux__
  // Containers and taskset narrow the affinity; hardware_concurrency() may not see it.
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (threads < 0) throw InvalidArgument("threads must be 0 (one per core) or more");
  if (count <= 0) return;
  const std::int64_t wanted = threads == 0 ? default_threads() : threads;
  const std::int64_t workers = std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1,
                                                        std::min(wanted, count));
  if (workers == 1) return body(0, count);

  // Small ranges taken one after another: a core that is busy elsewhere does not hold up the rest.
  const std::int64_t step = std::max(grain, ceil_div(count, workers * 4));
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  auto work = [&] {
    for (;;) {
      const std::int64_t begin = next.fetch_add(step);
      if (begin >= count) return;
      try {
        body(begin, std::min(begin + step, count));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<std::size_t>(workers - 1));
  try {
    for (std::int64_t i = 1; i < workers; ++i) pool.emplace_back(work);
  } catch (...) {
    // The system has no more threads or memory: those that started, and this one, do the work.
  }
  work();
  for (std::thread& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace zimage_mxfp8::detail
