// Clusters of thread blocks, and kernels that overlap with those before them in the stream (PTX
// ISA: barrier.cluster, griddepcontrol). cuda/launch.cuh launches such kernels.
#pragma once

#include <stdint.h>

namespace zimage_mxfp8::detail {

__device__ inline uint32_t block_of_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t blocks_of_cluster() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// The two halves of cluster_sync(), for all threads of the cluster.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Lets the next kernel of the stream begin where there is room.
__device__ inline void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernels before this one in the stream have completed. The code ahead of the wait
// overlaps with them and must not access global memory.
__device__ inline void await_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace zimage_mxfp8::detail
