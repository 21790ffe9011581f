// INT8 GEMMs with one float32 scale per row, see fused_gemm.cuh. Sums are exact, so D has the same
// bits as from any other kernel, with an epilogue as without. A low-rank addend adds to the scaled
// sums, in the tensor cores' order.
#include "gemm/dispatch/heuristics.h"
#include "gemm/sm90/fused_gemm.cuh"
#include "gemm/sm90/int8_fused.h"

namespace zimage_mxfp8::detail {
namespace {

using namespace fused_gemm;

struct Int8 {
  using Sum = int32_t;
  using Scaling = KeepValues;

  template <int count>
  static __device__ void multiply(int32_t (&sums)[count], uint64_t a, uint64_t b, bool add) {
    WgmmaInt8<2 * count>::multiply(sums, a, b, add);
  }

  // Scaled here: rounded to BF16 as they are, sums would lose more than the codes.
  template <class Epilogue>
  static __device__ auto scaled(const int32_t (&sums)[Epilogue::kRows / 2],
                                const Operands& operands, const Epilogue& epilogue, int token,
                                int tile) {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2, last = operands.n - 2;
    const auto of_token = [&](int at) {
      return __ldg(operands.a_scales + min(token + at, operands.m - 1));
    };
    const float low = of_token(lane / 4), high = of_token(lane / 4 + 8);
    const int first_half = epilogue.row_of_b(tile, 0), second_half = epilogue.row_of_b(tile, 1);
    const float* const b_scales = operands.b_scales;
    return [=, &sums](int i) {
      constexpr int kPerHalf = Epilogue::kRows / 16;  // groups of eight columns
      const int group = i / 4, half = group < kPerHalf ? first_half : second_half;
      const int row = min(half + group % kPerHalf * 8 + column, last);
      const float2 of_columns = __ldg(reinterpret_cast<const float2*>(b_scales + row));
      return __fmul_rn(__fmul_rn(__int2float_rn(sums[i]), i / 2 % 2 == 0 ? low : high),
                       i % 2 == 0 ? of_columns.x : of_columns.y);
    };
  }
};

constexpr int kNarrowRows = 192;  // of B in a tile
static_assert(kNarrowRows == kInt8SM90NarrowTileN);

}  // namespace

void gemm_int8_sm90(const ConstInt8View& a, const ConstInt8View& b, const LowRankAddend* addend,
                    const MatrixView& target, CudaStream stream) {
  if (int8_sm90_takes_narrow_tiles(a.rows, b.rows, multiprocessors(current_device()))) {
    run_scale<Int8, kNarrowRows>(a, b, addend, target, stream);
  } else {
    run_scale<Int8>(a, b, addend, target, stream);
  }
}

void gemm_int8_silu_multiply_sm90(const ConstInt8View& a, const ConstInt8View& b,
                                  const LowRankAddend* addend, const MatrixView& target,
                                  CudaStream stream) {
  run_silu_multiply<Int8>(a, b, addend, target, stream);
}

void gemm_int8_rotate_heads_sm90(const ConstInt8View& a, const ConstInt8View& b,
                                 const zimage_mxfp8::RotateHeads& heads,
                                 const LowRankAddend* addend, const MatrixView& target,
                                 CudaStream stream) {
  run_rotate_heads<Int8>(a, b, heads, addend, target, stream);
}

}  // namespace zimage_mxfp8::detail
