#include <cuda/atomic>

#include "cuda/launch.cuh"
#include "peers/signals_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

using Signal = cuda::atomic_ref<uint32_t, cuda::thread_scope_system>;

constexpr int kLooksAtOwnMemory = 64;  // for each at `released`, which is in the host's memory

__global__ void __launch_bounds__(PeerMemory::kMaxRanks) wait_kernel(const Wait wait) {
  uint32_t& next = wait.own->next[wait.channel];
  const uint32_t number = next;
  const int other = static_cast<int>(threadIdx.x);
  if (other < wait.ranks && other != wait.rank) {
    // The acquire orders what follows behind what the rank sent before its signal.
    Signal arrived(wait.own->arrived[wait.channel][other]);
    // Another rank may be one signal ahead; numbers wrap around.
    for (uint32_t looks = 1;
         static_cast<int32_t>(arrived.load(cuda::memory_order_acquire) - number) < 0; ++looks) {
      if (looks % kLooksAtOwnMemory == 0 && *wait.released) break;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) next = number + 1;
}

}  // namespace

void wait_cuda(const Wait& wait, CudaStream stream) {
  launch(wait_kernel, 1, PeerMemory::kMaxRanks, stream, wait);
}

}  // namespace zimage_mxfp8::detail
