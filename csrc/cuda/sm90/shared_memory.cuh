// Loads and stores of shared memory by 32-bit address (PTX ISA: ld.shared, st.shared, stmatrix).
#pragma once

#include <stdint.h>

namespace zimage_mxfp8::detail {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline float4 load_shared(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Loads from the same address of another block of the cluster, or of this one.
__device__ inline float2 load_shared(uint32_t address, uint32_t block_of_cluster) {
  float2 value;
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [remote]; }"
      : "=f"(value.x), "=f"(value.y)
      : "r"(address), "r"(block_of_cluster)
      : "memory");
  return value;
}

__device__ inline void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ inline void store_shared(uint32_t address, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y)
               : "memory");
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

// Stores four 8x8 matrices of 16-bit numbers, held as wgmma and mma hold them: lane l gives the
// address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Stores four 8x8 matrices as store_matrices() does, each transposed.
__device__ inline void store_matrices_transposed(uint32_t address, const uint32_t (&matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

}  // namespace zimage_mxfp8::detail
