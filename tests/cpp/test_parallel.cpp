#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "cpu/parallel.h"
#include "zimage_mxfp8/error.h"

using zimage_mxfp8::detail::parallel_for;

TEST_CASE("every index is visited once") {
  for (const std::int64_t count : {0, 1, 7, 1000}) {
    for (const std::int64_t grain : {1, 3, 5000}) {
      for (const int threads : {0, 1, 2, 9}) {
        std::vector<std::atomic<int>> visits(static_cast<std::size_t>(count));
        parallel_for(count, grain, threads, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
        });
        for (const auto& visit : visits) REQUIRE(visit == 1);
      }
    }
  }
}

TEST_CASE("an exception reaches the caller, once all threads are done") {
  std::atomic<int> inside{0};
  CHECK_THROWS_WITH(parallel_for(100, 1, 4,
                                 [&](std::int64_t begin, std::int64_t) {
                                   ++inside;
                                   if (begin > 40) {
                                     --inside;
                                     throw std::runtime_error("stop");
                                   }
                                   --inside;
                                 }),
                    "stop");
  CHECK(inside == 0);
  CHECK_THROWS_AS(parallel_for(1, 1, -1, [](std::int64_t, std::int64_t) {}),
                  zimage_mxfp8::InvalidArgument);
}
