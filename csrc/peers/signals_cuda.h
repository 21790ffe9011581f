#pragma once

#include <cstdint>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/peer_memory.h"

namespace zimage_mxfp8::detail {

// What ranks tell each other, at the beginning of the memory of each.
struct Signals {
  std::uint32_t arrived[PeerMemory::kMaxRanks];  // by each other rank: its last barrier
  std::uint32_t barriers;                        // of this rank
};

// Tells all other ranks that this rank's copies have arrived, and waits for theirs, or until
// *released is not 0.
struct Barrier {
  Signals* of_rank[PeerMemory::kMaxRanks];
  int rank;
  int ranks;
  const volatile std::uint32_t* released;
};
void barrier_cuda(const Barrier& barrier, CudaStream stream);

}  // namespace zimage_mxfp8::detail
