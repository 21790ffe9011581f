#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/fused_gemm.h"

using namespace zimage_mxfp8;

namespace {

// The memory of a call. It is the host's, so every call is refused; what matters is the reason.
struct Memory {
  alignas(16) std::uint8_t a[16 * 32]{}, b[384 * 32]{};
  alignas(16) float a_scales[16]{}, b_scales[384]{}, rotations[16 * 128]{};
  alignas(16) std::uint16_t weight[128]{}, target[16 * 384]{};
};

Memory memory;

struct Call {
  ConstRowScaledView a{memory.a, memory.a_scales, 16, 32};
  ConstRowScaledView b{memory.b, memory.b_scales, 384, 32};
  const void* q_weight = memory.weight;
  ConstMatrixView rotations{memory.rotations, DType::kFloat32, 16, 128, 128};
  std::int64_t heads = 1;
  float eps = 1e-5f;
  MatrixView target{memory.target, DType::kBFloat16, 16, 384, 384};

  void rotate() const {
    gemm_rotate_heads(a, b, q_weight, memory.weight, rotations, heads, eps, target, CudaStream{});
  }
  void gate() const { gemm_silu_multiply(a, b, target, CudaStream{}); }
};

}  // namespace

TEST_CASE("products with fused epilogues refuse what they cannot compute") {
  CHECK_THROWS_AS(Call{}.rotate(), Error);  // no device, or not its memory
  const auto refuses = [](auto change) {
    Call call;
    change(call);
    CHECK_THROWS_AS(call.rotate(), InvalidArgument);
  };
  refuses([](Call& c) { c.a.codes = nullptr; });
  refuses([](Call& c) { c.a.codes = memory.a + 1; });
  refuses([](Call& c) { c.b.scales = memory.b_scales + 1; });
  refuses([](Call& c) { c.a.rows = -1; });
  refuses([](Call& c) { c.a.cols = 16; });
  refuses([](Call& c) { c.a.cols = c.b.cols = 24; });
  refuses([](Call& c) { c.a.cols = c.b.cols = 0; });
  refuses([](Call& c) { c.heads = 2; });
  refuses([](Call& c) { c.heads = 0; });
  refuses([](Call& c) { c.eps = -1.0f; });
  refuses([](Call& c) { c.eps = std::nanf(""); });
  refuses([](Call& c) { c.q_weight = nullptr; });
  refuses([](Call& c) { c.q_weight = memory.weight + 1; });
  refuses([](Call& c) { c.rotations.rows = 15; });
  refuses([](Call& c) { c.rotations.row_stride = 129; });
  refuses([](Call& c) { c.target.cols = 376; });
  refuses([](Call& c) { c.target.row_stride = 385; });
  refuses([](Call& c) { c.target.row_stride = std::int64_t{1} << 62; });
  refuses([](Call& c) { c.target.row_stride = INT64_MAX - 7; });
  refuses([](Call& c) { c.rotations.row_stride = std::int64_t{1} << 62; });
  refuses([](Call& c) { c.target.dtype = DType::kFloat16; });
  refuses([](Call& c) { c.target.data = memory.a; });

  Call call;
  call.target.cols = 192;
  CHECK_THROWS_AS(call.gate(), Error);
  call.b.rows = 383;
  CHECK_THROWS_AS(call.gate(), InvalidArgument);
  call.b.rows = 382;
  call.target.cols = 191;
  CHECK_THROWS_AS(call.gate(), InvalidArgument);
}

TEST_CASE("products with fused epilogues: nothing to compute, and devices") {
  Call call;
  call.a.rows = call.rotations.rows = call.target.rows = 0;
  CHECK_NOTHROW(call.rotate());
  CHECK_NOTHROW([&] {
    call.target.cols = 192;
    call.gate();
  }());
  CHECK(!supports_fused_gemm(kHost));
  CHECK(!prefers_fused_gemm(4224, 20480, kHost));
  const int missing = static_cast<int>(cuda_devices().size());
  CHECK_THROWS_AS(supports_fused_gemm(missing), Unsupported);
}
