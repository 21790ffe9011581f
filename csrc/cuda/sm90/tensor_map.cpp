#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime.h>

#include <string>

#include "cuda/runtime.h"

namespace zimage_mxfp8::detail {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    ZM_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                   cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      throw Unsupported("the CUDA driver is too old; install a newer one");
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int64_t item, int64_t rows,
                       int64_t cols, int64_t row_stride, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride * item)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / item),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode_tiled()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw CudaError("CUDA: cuTensorMapEncodeTiled failed with " +
                    std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace zimage_mxfp8::detail
