// Launching kernels, with every launch checked.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda/runtime.h"
#include "zimage_mxfp8/device.h"

namespace zimage_mxfp8::detail {

// Launches blocks with up to 48 KiB of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch_with_shared_memory(void (*kernel)(Parameters...), dim3 blocks, uint32_t threads,
                               int shared_bytes, CudaStream stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  // Unlike <<<>>>, this reports errors of this launch only, not earlier ones.
  ZM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, uint32_t threads, CudaStream stream,
            Arguments&&... arguments) {
  launch_with_shared_memory(kernel, blocks, threads, 0, stream,
                            static_cast<Arguments&&>(arguments)...);
}

// Launches clusters of blocks with dynamic shared memory. The kernel may begin before those ahead
// of it in the stream have completed: it must await_predecessors() (cuda/sm90/cluster.cuh).
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), uint32_t clusters, uint32_t cluster_blocks,
                     uint32_t threads, int shared_bytes, CudaStream stream,
                     Arguments&&... arguments) {
  ZM_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster_blocks;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * cluster_blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = 2;
  ZM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...));
}

// Work items as the 32-bit number that kernels count with.
inline uint32_t checked_count(int64_t count) {
  if (count > UINT32_MAX / 2) throw InvalidArgument("the matrix is too large for one launch");
  return static_cast<uint32_t>(count);
}

inline uint32_t grid_for(uint32_t items, uint32_t items_per_block) {
  return (items + items_per_block - 1) / items_per_block;
}

}  // namespace zimage_mxfp8::detail
