// In builds without the target 90a.
#include "gemm/dispatch/missing.h"

#include "gemm/dispatch/table.h"
#include "gemm/sm90/narrow.h"

namespace zimage_mxfp8::detail {
namespace {

struct Reason {
  static constexpr const char* text =
      "this build has no kernels for sm90: rebuild it with 90a in ZM_CUDA_ARCHS";
};

}  // namespace

const GemmImplementation kMixedSM90 = missing_kernel<Reason>();
const GemmImplementation kFP8SM90 = missing_kernel<Reason>();
const GemmImplementation kInt8SM90 = missing_kernel<Reason>();

void narrow_gemm_sm90(const ConstRowScaledView&, const ConstRowScaledView&, const float*,
                      const MatrixView&, CudaStream) {
  throw Unsupported(Reason::text);
}

void narrow_gemm_sm90(const ConstInt8View&, const ConstInt8View&, const float*, const MatrixView&,
                      CudaStream) {
  throw Unsupported(Reason::text);
}

void narrow_gemm_sm90(const ConstMatrixView&, const ConstMatrixView&, const float*,
                      const MatrixView&, CudaStream) {
  throw Unsupported(Reason::text);
}

}  // namespace zimage_mxfp8::detail
