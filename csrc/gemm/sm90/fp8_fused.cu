// FP8 GEMMs with one float32 scale per row, see fused_gemm.cuh.
//
// With a low-rank addend, D = (A B^T + X U^T) scaled: X is divided by A's scales and U by B's
// beforehand, because sums are scaled at the end.
#include "gemm/sm90/fp8_fused.h"
#include "gemm/sm90/fused_gemm.cuh"

namespace zimage_mxfp8::detail {
namespace {

using namespace fused_gemm;

struct E4M3 {
  using Sum = float;
  using Scaling = ScaleValues;

  template <int count>
  static __device__ void multiply(float (&sums)[count], uint64_t a, uint64_t b, bool add) {
    WgmmaFP8<2 * count>::multiply(sums, a, b, add);
  }

  // The epilogue scales.
  template <class Epilogue>
  static __device__ auto scaled(const float (&sums)[Epilogue::kRows / 2], const Operands&,
                                const Epilogue&, int, int) {
    return [&sums](int i) { return sums[i]; };
  }
};

}  // namespace

void gemm_low_rank_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                        const LowRankAddend& addend, const MatrixView& target, CudaStream stream) {
  run_scale<E4M3>(a, b, &addend, target, stream);
}

void gemm_silu_multiply_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                             const LowRankAddend* addend, const MatrixView& target,
                             CudaStream stream) {
  run_silu_multiply<E4M3>(a, b, addend, target, stream);
}

void gemm_rotate_heads_sm90(const ConstRowScaledView& a, const ConstRowScaledView& b,
                            const zimage_mxfp8::RotateHeads& heads, const LowRankAddend* addend,
                            const MatrixView& target, CudaStream stream) {
  run_rotate_heads<E4M3>(a, b, heads, addend, target, stream);
}

}  // namespace zimage_mxfp8::detail
