// Memory of peers in one process; tests/python/gpu/test_ranks_cuda.py tries it with several.
#include <doctest/doctest.h>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/peer_memory.h"

using namespace zimage_mxfp8;

TEST_CASE("memory of peers needs a CUDA device") {
  if (!cuda_devices().empty()) return;
  CHECK_THROWS_AS(PeerMemory(0, 0, 2, 512), Unsupported);
}

TEST_CASE("memory of peers refuses what it cannot do") {
  if (cuda_devices().empty()) return;
  CHECK_THROWS_AS(PeerMemory(0, 2, 2, 512), InvalidArgument);
  CHECK_THROWS_AS(PeerMemory(0, -1, 2, 512), InvalidArgument);
  CHECK_THROWS_AS(PeerMemory(0, 0, PeerMemory::kMaxRanks + 1, 512), InvalidArgument);
  PeerMemory memory(0, 0, 2, 512);
  CHECK_THROWS_AS(memory.open(0, memory.handle()), InvalidArgument);
  CHECK_THROWS_AS(memory.open(2, memory.handle()), InvalidArgument);
  const void* const data = memory.data();
  CHECK_THROWS_AS(memory.send(data, 32, {16, 4}, 0, 16, {}), InvalidArgument);  // 1 is not open
  CHECK_THROWS_AS(memory.signal(0, {}), InvalidArgument);
  CHECK_THROWS_AS(memory.wait(0, {}), InvalidArgument);
  PeerMemory alone(0, 0, 1, 512);
  CHECK_THROWS_AS(alone.send(data, 32, {16, 4}, 0, 15, {}), InvalidArgument);
  CHECK_THROWS_AS(alone.send(data, 15, {16, 4}, 0, 16, {}), InvalidArgument);
  CHECK_THROWS_AS(alone.send(data, 32, {16, 32}, 1, 16, {}), InvalidArgument);
  CHECK_THROWS_AS(alone.send(data, 32, {16, 2}, 0, std::size_t(-1), {}), InvalidArgument);
  CHECK_THROWS_AS(alone.send(data, 32, {16, 1}, 513, 16, {}), InvalidArgument);
  CHECK_NOTHROW(alone.send(data, 32, {16, 32}, 0, 16, {}));
  CHECK_THROWS_AS(alone.signal(PeerMemory::kMaxChannels, {}), InvalidArgument);
  CHECK_THROWS_AS(alone.wait(-1, {}), InvalidArgument);
  CHECK_NOTHROW(alone.signal(0, {}));
  CHECK_NOTHROW(alone.wait(0, {}));
}
