// Asynchronous copies between global and shared memory (PTX ISA: cp.async.bulk and its fences).
// Tensor maps come from cuda/sm90/tensor_map.h.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "cuda/sm90/shared_memory.cuh"

namespace zimage_mxfp8::detail {

// Boxes with TMA's swizzle of 128 bytes begin at multiples of this many bytes of shared memory.
constexpr int kTmaAlignment = 1024;

// Returns the first aligned address of dynamic shared memory. Kernels are launched with
// kTmaAlignment bytes more than they use from there.
__device__ inline uint32_t tma_aligned(const void* dynamic_shared) {
  return (shared_address(dynamic_shared) + kTmaAlignment - 1) / kTmaAlignment * kTmaAlignment;
}

// Makes the copy engine fetch a tensor map before its first use.
__device__ inline void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- To shared memory. The barrier counts the bytes that have arrived.

// Loads the box of a tensor map that begins at (column, row).
__device__ inline void tma_load_2d(const CUtensorMap& map, uint32_t barrier, uint32_t target,
                                   int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Loads a box to each block of the cluster that has its bit set in `blocks`, at the same address,
// and counts it at the same barrier in each.
__device__ inline void tma_load_2d_multicast(const CUtensorMap& map, uint32_t barrier,
                                             uint32_t target, int column, int row,
                                             uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// Loads adjacent bytes, a multiple of 16.
__device__ inline void tma_load_1d(const void* source, uint32_t barrier, uint32_t target,
                                   uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::
          "r"(target),
      "l"(source), "r"(barrier), "r"(bytes)
      : "memory");
}

// Makes global memory that other threads stored, and that this thread has acquired, visible to the
// loads that it starts.
__device__ inline void tma_load_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- From shared memory. One thread starts, commits and awaits the stores.

// Makes this thread's stores to shared memory visible to the copy engine.
__device__ inline void tma_store_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores a box; elements beyond the tensor's edges are left out.
__device__ inline void tma_store_2d(const CUtensorMap& map, uint32_t source, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
          &map),
      "r"(source), "r"(column), "r"(row)
      : "memory");
}

__device__ inline void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the last `pending` committed groups have read their source.
template <int pending = 0>
__device__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

}  // namespace zimage_mxfp8::detail
