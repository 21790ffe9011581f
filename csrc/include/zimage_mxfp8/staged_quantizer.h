// Encoding host memory on a CUDA device.
#pragma once

#include <memory>

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// Copies a matrix to a device, encodes it there and copies codes and scales back. Owns a stream and
// device memory, which grow to the largest matrix seen and are freed with it. One thread at a time
// may use an object; several objects work side by side.
class StagedQuantizer {
 public:
  // Throws Unsupported without CUDA or without such a device, CudaError if CUDA fails.
  explicit StagedQuantizer(int device);
  ~StagedQuantizer();
  StagedQuantizer(const StagedQuantizer&) = delete;
  StagedQuantizer& operator=(const StagedQuantizer&) = delete;

  // The same as quantize() of quantize.h on host memory: same bytes, same errors, and CudaError.
  // Returns when the target is written.
  void quantize(const ConstMatrixView& source, const MXFP8View& target);

 private:
  struct Resources;
  std::unique_ptr<Resources> resources_;
};

}  // namespace zimage_mxfp8
