#include <cuda/atomic>

#include "cuda/launch.cuh"
#include "peers/signals_cuda.h"

namespace zimage_mxfp8::detail {
namespace {

using Signal = cuda::atomic_ref<uint32_t, cuda::thread_scope_system>;

constexpr int kLooksAtOwnMemory = 64;  // for each at `released`, which is in the host's memory

__global__ void __launch_bounds__(PeerMemory::kMaxRanks) barrier_kernel(const Barrier barrier) {
  Signals& own = *barrier.of_rank[barrier.rank];
  __shared__ uint32_t number;
  if (threadIdx.x == 0) number = ++own.barriers;
  __syncthreads();
  const int other = static_cast<int>(threadIdx.x);
  if (other >= barrier.ranks || other == barrier.rank) return;
  // Copies earlier in the stream have completed; the release orders them before the signal.
  Signal(barrier.of_rank[other]->arrived[barrier.rank]).store(number, cuda::memory_order_release);
  Signal arrived(own.arrived[other]);
  for (uint32_t looks = 1;; ++looks) {
    // Another rank may be one barrier ahead; numbers wrap around.
    if (static_cast<int32_t>(arrived.load(cuda::memory_order_acquire) - number) >= 0) return;
    if (looks % kLooksAtOwnMemory == 0 && *barrier.released) return;
  }
}

}  // namespace

void barrier_cuda(const Barrier& barrier, CudaStream stream) {
  launch(barrier_kernel, 1, PeerMemory::kMaxRanks, stream, barrier);
}

}  // namespace zimage_mxfp8::detail
