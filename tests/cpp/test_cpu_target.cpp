#include <doctest/doctest.h>

#include <string>

#include "zimage_mxfp8/cpu_target.h"
#include "zimage_mxfp8/error.h"

using namespace zimage_mxfp8;

TEST_CASE("the fastest available target is chosen, any can be forced") {
  const auto available = available_cpu_targets();
  REQUIRE(available.front() == CpuTarget::kBaseline);
  for (const CpuTarget target : available) {
    force_cpu_target(name(target));
    CHECK(active_cpu_target() == target);
  }
  CHECK(active_cpu_target() == available.back());
  CHECK_THROWS_AS(force_cpu_target("sse9"), InvalidArgument);
  CHECK(active_cpu_target() == available.back());
  if (available.size() < 3) CHECK_THROWS_AS(force_cpu_target("avx512"), Unsupported);
}
