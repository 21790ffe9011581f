#include "zimage_mxfp8/staged_quantizer.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <string>

#include "check.h"
#include "cuda/runtime.h"
#include "quantize/nonfinite.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/quantize.h"

namespace zimage_mxfp8 {

struct StagedQuantizer::Resources {
  int device = -1;
  cudaStream_t stream = nullptr;
  void* memory = nullptr;
  std::size_t bytes = 0;

  ~Resources() {
    // The call that failed has reported these errors.
    int previous = 0;
    cudaGetDevice(&previous);
    cudaSetDevice(device);
    cudaFree(memory);
    if (stream) cudaStreamDestroy(stream);
    cudaSetDevice(previous);
  }

  void reserve(std::size_t wanted) {
    if (wanted <= bytes) return;
    ZM_CUDA_CHECK(cudaFree(memory));
    memory = nullptr;
    bytes = 0;
    ZM_CUDA_CHECK(cudaMalloc(&memory, wanted));
    bytes = wanted;
  }
};

StagedQuantizer::StagedQuantizer(int device) {
  detail::find_device(device);
  resources_ = std::make_unique<Resources>();
  resources_->device = device;
  const detail::DeviceGuard guard(device);
  ZM_CUDA_CHECK(cudaStreamCreateWithFlags(&resources_->stream, cudaStreamNonBlocking));
}

StagedQuantizer::~StagedQuantizer() = default;

void StagedQuantizer::quantize(const ConstMatrixView& source, const MXFP8View& target) {
  detail::check_encoding(source, target);
  if (source.rows == 0 || source.cols == 0) return;
  const detail::DeviceGuard guard(resources_->device);
  const MXFP8Shape shape{source.rows, source.cols};
  const auto codes_bytes = static_cast<std::size_t>(shape.code_bytes());
  const auto scales_bytes = static_cast<std::size_t>(shape.scale_bytes());
  const std::size_t item = element_size(source.dtype);
  // Rows on the device begin at multiples of 16 bytes, where the kernel is fastest.
  const auto row_bytes = static_cast<std::size_t>(source.cols) * item;
  const std::size_t pitch = (row_bytes + 15) / 16 * 16;
  resources_->reserve(codes_bytes + scales_bytes + pitch * static_cast<std::size_t>(source.rows));
  auto* codes = static_cast<std::uint8_t*>(resources_->memory);
  std::uint8_t* scales = codes + codes_bytes;
  std::uint8_t* matrix = scales + scales_bytes;

  const std::size_t source_pitch =
      source.rows > 1 ? static_cast<std::size_t>(source.row_stride) * item : row_bytes;

  const cudaStream_t stream = resources_->stream;
  // Even on failure, nothing may touch the caller's memory after the call.
  const std::unique_ptr<CUstream_st, cudaError_t (*)(cudaStream_t)> wait(stream,
                                                                         cudaStreamSynchronize);
  ZM_CUDA_CHECK(cudaMemcpy2DAsync(matrix, pitch, source.data, source_pitch, row_bytes,
                                  static_cast<std::size_t>(source.rows), cudaMemcpyHostToDevice,
                                  stream));
  zimage_mxfp8::quantize(ConstMatrixView{matrix, source.dtype, source.rows, source.cols,
                                         static_cast<std::int64_t>(pitch / item)},
                         MXFP8View{codes, scales, source.rows, source.cols}, CudaStream{stream});
  ZM_CUDA_CHECK(cudaMemcpyAsync(target.codes, codes, codes_bytes, cudaMemcpyDeviceToHost, stream));
  ZM_CUDA_CHECK(
      cudaMemcpyAsync(target.scales, scales, scales_bytes, cudaMemcpyDeviceToHost, stream));
  ZM_CUDA_CHECK(cudaStreamSynchronize(stream));
  // Only a NaN or an infinity gives this scale.
  if (std::memchr(target.scales, 255, scales_bytes)) detail::throw_nonfinite(source, 1);
}

}  // namespace zimage_mxfp8
