// Hopper's asynchronous copies and barriers (PTX ISA: mbarrier, cp.async.bulk, setmaxnreg,
// griddepcontrol).
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace zimage_mxfp8::detail {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at the same place of another block of the cluster (or of this one). It
// tells that shared memory has been read, for which the default scope does: a release to the whole
// cluster costs a fence of global memory.
__device__ inline void barrier_arrive(uint32_t barrier, uint32_t block_of_cluster) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(block_of_cluster)
      : "memory");
}

// Waits for the completion of the phase with the given parity.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline uint32_t block_of_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
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

// For kernels that launch_clusters() starts: lets the next kernel of the stream begin where there
// is room, and waits until those before have completed. What comes ahead of the wait overlaps with
// them and must not touch global memory.
__device__ inline void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ inline void await_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Copies a box of a tensor map, beginning at (column, row), to shared memory.
__device__ inline void tma_load_2d(const CUtensorMap& map, uint32_t barrier, uint32_t target,
                                int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same to every block of the cluster that `blocks` has a bit for, at the same place in each.
__device__ inline void copy_box_to_cluster(const CUtensorMap& map, uint32_t barrier,
                                           uint32_t target, int column, int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// Copies adjacent bytes, a multiple of 16.
__device__ inline void copy_bytes(const void* source, uint32_t barrier, uint32_t target,
                                  uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::
          "r"(target),
      "l"(source), "r"(barrier), "r"(bytes)
      : "memory");
}

// ---- From shared memory to a tensor. fence_for_copies() makes a thread's stores visible to the
// copy engine; copies are started, committed and awaited by one thread.

__device__ inline void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes what was stored in global memory, and this thread has seen to be so, visible to the copies
// that it starts.
__device__ inline void fence_global_for_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Copies a box out; what lies beyond the tensor's edges is left out.
__device__ inline void copy_box_out(const CUtensorMap& map, uint32_t source, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
          &map),
      "r"(source), "r"(column), "r"(row)
      : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the last `pending` committed groups have read their source.
template <int pending>
__device__ void await_copies_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// ---- Shared memory by address

// Four 8x8 matrices of 16-bit numbers, held as wgmma and mma hold them: lane l gives the address of
// row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// The same, each transposed.
__device__ inline void store_matrices_transposed(uint32_t address, const uint32_t (&matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

__device__ inline float4 load_shared(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ inline void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Stores at the same address of another block of the cluster, or of this one.
__device__ inline void store_shared(uint32_t address, uint32_t block_of_cluster, float4 value) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5}; }" ::"r"(address),
      "r"(block_of_cluster), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

template <uint32_t registers>
__device__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <uint32_t registers>
__device__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Has the copy engine fetch a tensor map before its first use.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A barrier among some of the block's threads; `id` from 1 to 15.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace zimage_mxfp8::detail
