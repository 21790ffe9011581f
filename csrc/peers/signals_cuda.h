#pragma once

#include <cstdint>

#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/peer_memory.h"

namespace zimage_mxfp8::detail {

// What ranks tell each other, at the beginning of the memory of each, for each channel.
struct Signals {
  std::uint32_t arrived[PeerMemory::kMaxChannels][PeerMemory::kMaxRanks];  // each rank's last one
  std::uint32_t next[PeerMemory::kMaxChannels];                            // this rank's next one
};

// Waits until all other ranks' signals on a channel have arrived, or until *released is not 0, and
// counts on.
struct Wait {
  Signals* own;
  int channel;
  int rank;
  int ranks;
  const volatile std::uint32_t* released;
};
void wait_cuda(const Wait& wait, CudaStream stream);

}  // namespace zimage_mxfp8::detail
