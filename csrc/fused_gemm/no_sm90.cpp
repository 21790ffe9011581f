// In place of fused_gemm_sm90.cu in builds without that target.
#include "fused_gemm/fused_gemm_cuda.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr const char* kReason =
    "this build has no kernels for sm90: rebuild it with 90a in ZM_CUDA_ARCHS";

}  // namespace

Support supports_fused_gemm_sm90() { return {false, kReason}; }

double utilization_sm90(std::int64_t, std::int64_t, int) { throw Unsupported(kReason); }

void gemm_silu_multiply_sm90(const ConstRowScaledView&, const ConstRowScaledView&,
                             const MatrixView&, CudaStream) {
  throw Unsupported(kReason);
}

void gemm_rotate_heads_sm90(const ConstRowScaledView&, const ConstRowScaledView&, const void*,
                            const void*, const ConstMatrixView&, std::int64_t, float,
                            const MatrixView&, CudaStream) {
  throw Unsupported(kReason);
}

}  // namespace zimage_mxfp8::detail
