// One block-scaled kernel. The build compiles this file once for each: ZM_CONFIG is a tile of
// block_scaled_kernel.h, ZM_OUTPUT the CUTLASS type of D, ZM_VARIANT the name in block_scaled.h.
#include <string>

#include "cuda/launch.cuh"
#include "gemm/blackwell/block_scaled.h"
#include "gemm/blackwell/block_scaled_kernel.h"

namespace zimage_mxfp8::detail {
namespace {

using Kernel = BlockScaledKernel<ZM_CONFIG, ZM_OUTPUT>;

void check(cutlass::Status status) {
  if (status == cutlass::Status::kSuccess) return;
  ZM_CUDA_CHECK(cudaGetLastError());
  throw CudaError(std::string("CUTLASS: ") + cutlassGetStatusString(status));
}

template <class K>
typename K::Gemm::Arguments arguments(const GemmTask& task) {
  auto result = K::arguments(task);
  result.hw_info.device_id = current_device();
  result.hw_info.sm_count = multiprocessors(result.hw_info.device_id);
  return result;
}

template <class K>
std::size_t workspace(const GemmTask& task) {
  return K::Gemm::get_workspace_size(arguments<K>(task));
}

template <class K>
void run(const GemmTask& task, Workspace workspace, CudaStream stream) {
  typename K::Gemm gemm;
  check(gemm.run(arguments<K>(task), workspace.data, static_cast<cudaStream_t>(stream.handle)));
}

}  // namespace

extern const BlockScaledVariant ZM_VARIANT{workspace<Kernel>, run<Kernel>};

}  // namespace zimage_mxfp8::detail
