// In place of fused_gemm_sm90.cu in builds without that target.
#include "fused_gemm/fused_gemm_cuda.h"
#include "gemm/gemm_cuda.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

[[noreturn]] void refuse() { throw Unsupported(supports_sm90().reason); }

}  // namespace

double utilization_sm90(std::int64_t, std::int64_t, int) { refuse(); }

void gemm_silu_multiply_sm90(const ConstRowScaledView&, const ConstRowScaledView&,
                             const MatrixView&, CudaStream) {
  refuse();
}

void gemm_rotate_heads_sm90(const ConstRowScaledView&, const ConstRowScaledView&, const void*,
                            const void*, const ConstMatrixView&, std::int64_t, float,
                            const MatrixView&, CudaStream) {
  refuse();
}

}  // namespace zimage_mxfp8::detail
