// The ring of stages in shared memory between the thread that loads tiles (the producer) and the
// warpgroups that multiply them (the consumers).
//
// A stage is full when its loads have arrived, and empty when every consumer has released it. The
// barriers distinguish one lap of the ring from the next by parity only, so a thread must wait for
// every phase of the barriers that it uses.
#pragma once

#include <stdint.h>

#include "cuda/sm90/mbarrier.cuh"

namespace zimage_mxfp8::detail {

// Pairs of barriers in shared memory, for `count` buffers that are filled and emptied in turn.
template <int count>
struct BarrierPairs {
  static constexpr int bytes = 2 * count * kMbarrierBytes;
  uint32_t address;

  __device__ uint32_t full(int index) const { return address + index * kMbarrierBytes; }
  __device__ uint32_t empty(int index) const { return full(count + index); }

  // For one thread, before mbarrier_init_fence().
  __device__ void init(uint32_t full_arrivals, uint32_t empty_arrivals) const {
    for (int i = 0; i < count; ++i) {
      mbarrier_init(full(i), full_arrivals);
      mbarrier_init(empty(i), empty_arrivals);
    }
  }
};

// A position in the ring: the stage, and the parity of the lap.
template <int stages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A ring of stages that `consumers` warpgroups of a block read, and that `blocks` blocks of a
// cluster load for each other: a stage is loaded when it is empty in all of them.
template <int stages, int consumers, int blocks>
struct Pipeline {
  using State = PipelineState<stages>;
  using Barriers = BarrierPairs<stages>;
  Barriers barriers;
  int block;  // number of this block in the cluster

  // For one thread, before mbarrier_init_fence().
  __device__ void init() const { barriers.init(1, consumers * blocks); }

  // For the producer: waits until the stage is empty, and returns the barrier for the loads to it,
  // which have `bytes` in total.
  __device__ uint32_t acquire(const State& state, uint32_t bytes) const {
    mbarrier_wait(barriers.empty(state.stage), state.phase ^ 1);
    mbarrier_arrive_expect(barriers.full(state.stage), bytes);
    return barriers.full(state.stage);
  }

  // For consumers: waits until the stage is full.
  __device__ void wait(const State& state) const {
    mbarrier_wait(barriers.full(state.stage), state.phase);
  }

  // For consumers that skip stages which others take: the stage that is loaded as the `position`th
  // since the kernel began, and the wait until it is full.
  static __device__ uint32_t stage_at(uint32_t position) { return position % stages; }
  __device__ void wait_at(uint32_t position) const {
    mbarrier_wait(barriers.full(stage_at(position)), position / stages % 2);
  }

  // For all threads of a consumer: releases the stage to all producers that load to it. `thread` is
  // the thread's number in the warpgroup.
  __device__ void release(int stage, int thread) const {
    if (thread < blocks) mbarrier_arrive(barriers.empty(stage), blocks > 1 ? thread : block);
  }
};

}  // namespace zimage_mxfp8::detail
