#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "reference.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/row_scaled.h"
#include "zimage_mxfp8/scale_layout.h"

using namespace zimage_mxfp8;

namespace {

std::vector<float> ramp(std::int64_t rows, std::int64_t cols, double step) {
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(std::sin(step * static_cast<double>(i + 1)) *
                                   std::ldexp(1.0, static_cast<int>(i % 7) - 3));
  }
  return values;
}

struct Encoded {
  std::vector<std::uint8_t> codes, scales;
  std::int64_t rows, cols;

  Encoded(const std::vector<float>& values, std::int64_t rows_, std::int64_t cols_)
      : rows(rows_), cols(cols_) {
    const MXFP8Shape shape{rows, cols};
    codes.resize(static_cast<std::size_t>(shape.code_bytes()));
    scales.resize(static_cast<std::size_t>(shape.scale_bytes()));
    quantize(ConstMatrixView{values.data(), DType::kFloat32, rows, cols, cols},
             MXFP8View{codes.data(), scales.data(), rows, cols});
  }
  ConstMXFP8View view() const { return {codes.data(), scales.data(), rows, cols}; }
  double value(std::int64_t row, std::int64_t col) const {
    const int byte = scales[static_cast<std::size_t>(
        scale_offset(row, col / 32, ceil_div(ceil_div(cols, 32), 4)))];
    return std::ldexp(reference::e4m3(codes[static_cast<std::size_t>(row * cols + col)]),
                      byte - 127);
  }
};

struct RowScaled {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  std::int64_t rows, cols;

  RowScaled(std::int64_t rows_, std::int64_t cols_)
      : codes(static_cast<std::size_t>(rows_ * cols_)),
        scales(static_cast<std::size_t>(rows_)),
        rows(rows_),
        cols(cols_) {}
  RowScaledView view() { return {codes.data(), scales.data(), rows, cols}; }
  double value(std::int64_t row, std::int64_t col) const {
    return reference::e4m3(codes[static_cast<std::size_t>(row * cols + col)]) *
           static_cast<double>(scales[static_cast<std::size_t>(row)]);
  }
};

}  // namespace

TEST_CASE("the reference is the GEMM of the decoded operands") {
  const std::int64_t m = 5, n = 40, k = 96;
  const Encoded a(ramp(m, k, 0.7), m, k), b(ramp(n, k, 0.3), n, k);
  for (const int threads : {1, 3}) {
    std::vector<float> d(static_cast<std::size_t>(m * n));
    gemm({a.view(), b.view(), nullptr, MatrixView{d.data(), DType::kFloat32, m, n, n}}, threads);
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double want = 0, size = 0;
        for (std::int64_t x = 0; x < k; ++x) {
          want += a.value(i, x) * b.value(j, x);
          size += std::fabs(a.value(i, x) * b.value(j, x));
        }
        CHECK(std::fabs(d[static_cast<std::size_t>(i * n + j)] - want) <= size * 1e-6);
      }
    }
  }
}

TEST_CASE("folding keeps what fits and reports the rest") {
  const std::int64_t rows = 3, cols = 64;
  const Encoded source(ramp(rows, cols, 0.9), rows, cols);
  RowScaled folded(rows, cols);
  const FoldStats stats = fold(source.view(), folded.view(), 1.0);
  std::int64_t changed = 0;
  double error = 0, signal = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; ++j) {
      const double before = source.value(i, j), after = folded.value(i, j);
      changed += before != after;
      error += (before - after) * (before - after);
      signal += before * before;
    }
  }
  CHECK(stats.changed == changed);
  CHECK(stats.relative_error == doctest::Approx(std::sqrt(error / signal)));
}

TEST_CASE("folding refuses what it would spoil") {
  std::vector<float> values = ramp(2, 64, 0.4);
  for (std::size_t i = 0; i < 32; ++i) values[i] *= 0x1p-14f;
  const Encoded source(values, 2, 64);
  RowScaled folded(2, 64);
  CHECK_THROWS_AS(fold(source.view(), folded.view(), 1e-12), PrecisionLoss);
  CHECK_NOTHROW(fold(source.view(), folded.view()));
}

TEST_CASE("rows are encoded with scales of their own") {
  const std::vector<float> values = ramp(4, 70, 0.6);
  RowScaled rows(4, 70);
  quantize_rows(ConstMatrixView{values.data(), DType::kFloat32, 4, 70, 70}, rows.view());
  for (std::int64_t i = 0; i < 4; ++i) {
    double largest = 0;
    for (std::int64_t j = 0; j < 70; ++j) {
      largest = std::fmax(largest, std::fabs(values[static_cast<std::size_t>(i * 70 + j)]));
    }
    CHECK(rows.scales[static_cast<std::size_t>(i)] == doctest::Approx(largest / 448));
    for (std::int64_t j = 0; j < 70; ++j) {
      const double value = values[static_cast<std::size_t>(i * 70 + j)];
      // Half a step of E4M3: 2^-4 relative, or of its subnormals.
      CHECK(std::fabs(rows.value(i, j) - value) <=
            std::fmax(std::fabs(value) * 0x1.01p-4, largest / 448 * 0x1p-10));
    }
  }
}

TEST_CASE("arguments of a product that do not go together") {
  const Encoded a(ramp(4, 64, 0.5), 4, 64), b(ramp(16, 64, 0.2), 16, 64);
  const Encoded narrow(ramp(16, 32, 0.2), 16, 32), twelve(ramp(12, 64, 0.2), 12, 64);
  std::vector<float> d(64);
  const auto product = [&](const GemmOperand& left, const GemmOperand& right, MatrixView out) {
    gemm({left, right, nullptr, out});
  };
  const MatrixView out{d.data(), DType::kFloat32, 4, 16, 16};
  CHECK_NOTHROW(product(a.view(), b.view(), out));
  CHECK_THROWS_AS(product(a.view(), narrow.view(), out), InvalidArgument);
  CHECK_THROWS_AS(product(a.view(), twelve.view(), out), InvalidArgument);
  CHECK_THROWS_AS(product(a.view(), b.view(), {d.data(), DType::kFloat32, 4, 15, 15}),
                  InvalidArgument);
  CHECK_THROWS_AS(product(a.view(), b.view(), {nullptr, DType::kFloat32, 4, 16, 16}),
                  InvalidArgument);
  CHECK_THROWS_AS(product(a.view(), b.view(), {d.data(), DType::kFloat32, 4, 16, 8}),
                  InvalidArgument);
  CHECK_THROWS_AS(product(ConstMatrixView{d.data(), DType::kFloat32, 4, 16, 16}, b.view(), out),
                  InvalidArgument);
  CHECK_THROWS_AS(product(ConstMXFP8View{nullptr, nullptr, 4, 64}, b.view(), out), InvalidArgument);
  CHECK_THROWS_AS(find_gemm_kernel("fastest"), InvalidArgument);
  for (const GemmKernel* kernel : gemm_kernels()) {
    CHECK(&find_gemm_kernel(name(*kernel)) == kernel);
    CHECK(!operand_formats(*kernel).empty());
    CHECK(!epilogues(*kernel).empty());
  }
}

TEST_CASE("without a device only the reference is there") {
  const GemmProblem problem{
      4, 16, 64, OperandFormat::kMXFP8, OperandFormat::kMXFP8, DType::kBFloat16, false};
  CHECK(name(choose_gemm(problem, kHost)) == std::string("reference"));
  for (const GemmKernel* kernel : gemm_kernels()) {
    const Support support = supports(*kernel, problem, kHost);
    CHECK(support.ok == (name(*kernel) == std::string("reference")));
    CHECK(support.reason.empty() == support.ok);
  }
  CHECK_THROWS_WITH_AS(workspace_size(find_gemm_kernel("mxfp8_sm100"), problem, kHost),
                       "mxfp8_sm100 needs a CUDA device; 4x16x64 MXFP8 x MXFP8 -> BF16 is computed "
                       "by \"reference\" on the CPU",
                       Unsupported);
  const int missing = static_cast<int>(cuda_devices().size());
  CHECK_THROWS_AS(supports(find_gemm_kernel("dequantize"), problem, missing), Unsupported);
  CHECK_THROWS_AS(choose_gemm({4, 12, 64, problem.a, problem.b, problem.d, false}, kHost),
                  InvalidArgument);
}

TEST_CASE("problems with an epilogue") {
  GemmProblem problem{4,
                      32,
                      64,
                      OperandFormat::kRowScaled,
                      OperandFormat::kRowScaled,
                      DType::kBFloat16,
                      false,
                      GemmEpilogue::kSiluMultiply};
  for (const GemmKernel* kernel : gemm_kernels()) CHECK(!supports(*kernel, problem, kHost));
  CHECK_THROWS_AS(choose_gemm(problem, kHost), Unsupported);
  const auto refuses = [&](auto change) {
    GemmProblem changed = problem;
    change(changed);
    CHECK_THROWS_AS(choose_gemm(changed, kHost), InvalidArgument);
  };
  refuses([](GemmProblem& p) { p.bias = true; });
  refuses([](GemmProblem& p) { p.d = DType::kFloat32; });
  refuses([](GemmProblem& p) { p.n = 24; });
  refuses([](GemmProblem& p) {
    p.epilogue = GemmEpilogue::kNone;
    p.d_format = OperandFormat::kMXFP8;
  });
  refuses([](GemmProblem& p) {
    p.epilogue = GemmEpilogue::kRotateHeads;
    p.d_format = OperandFormat::kMXFP8;
  });
}

TEST_CASE("problems with a low-rank addend") {
  constexpr auto format = OperandFormat::kRowScaled;
  GemmProblem problem{4, 32, 64, format, format, DType::kBFloat16, false};
  problem.addend_rank = 12;
  CHECK_THROWS_WITH_AS(choose_gemm(problem, kHost),
                       "the addend's rank must be a multiple of 8, not 12", InvalidArgument);
  problem.addend_rank = 16;
  CHECK(supports(find_gemm_kernel("reference"), problem, kHost).reason ==
        "reference adds no low-rank addend");
  CHECK_THROWS_AS(choose_gemm(problem, kHost), Unsupported);
  problem.bias = true;
  CHECK_THROWS_WITH_AS(choose_gemm(problem, kHost), "a GEMM with an addend has no bias",
                       InvalidArgument);
}

TEST_CASE("the table of epilogues") {
  const std::vector<GemmEpilogue> all = gemm_epilogues();
  CHECK(all.front() == GemmEpilogue::kNone);
  for (const GemmEpilogue one : all) CHECK(find_gemm_epilogue(info(one).name) == one);
  CHECK_THROWS_WITH_AS(find_gemm_epilogue("fastest"), "unknown epilogue \"fastest\"",
                       InvalidArgument);
  const auto problem = [](std::int64_t n, GemmEpilogue epilogue) {
    constexpr auto format = OperandFormat::kRowScaled;
    return GemmProblem{4, n, 64, format, format, DType::kBFloat16, false, epilogue, format};
  };
  CHECK_THROWS_WITH_AS(choose_gemm(problem(24, GemmEpilogue::kSiluMultiply), kHost),
                       "N must be a multiple of 16 with silu_multiply, not 24", InvalidArgument);
  CHECK_THROWS_WITH_AS(choose_gemm(problem(384, GemmEpilogue::kRotateHeads), kHost),
                       "D is only encoded after silu_multiply", InvalidArgument);
}

TEST_CASE("arguments of an epilogue are checked before memory is touched") {
  alignas(16) static std::uint8_t codes[384 * 32];
  alignas(16) static float scales[384], rotations[2 * 128];
  alignas(16) static std::uint16_t weight[128], d[2 * 384];
  const ConstRowScaledView a{codes, scales, 2, 32}, b{codes, scales, 384, 32};
  const ConstMatrixView turns{rotations, DType::kFloat32, 2, 128, 128};
  const auto reason = [&](const RotateHeads& epilogue, void* target) {
    try {
      gemm(find_gemm_kernel("fp8_sm90"),
           {a, b, nullptr, MatrixView{target, DType::kBFloat16, 2, 384, 384}, epilogue}, {},
           CudaStream{});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    } catch (const Error&) {
      return std::string("of the device");
    }
    return std::string();
  };
  CHECK(reason({weight, weight, turns, 2, 2, 1e-5f}, d) ==
        "B's rows are 384, which cannot begin with 2 heads of q and 2 of k, of 128 each");
  CHECK(reason({weight, nullptr, turns, 1, 1, 1e-5f}, d) == "k_weight is a null pointer");
  CHECK(reason({weight, weight, {rotations, DType::kFloat32, 1, 128, 128}, 1, 1, 1e-5f}, d) ==
        "rotations must be float32 [2, 128]");
  alignas(16) static float both[2 * 192];
  const ConstMatrixView overlapping{both, DType::kFloat32, 2, 128, 128};
  CHECK(reason({weight, weight, overlapping, 1, 1, 1e-5f}, both) == "D overlaps with rotations");
}

TEST_CASE("an addend is checked before memory is touched") {
  alignas(16) static std::uint8_t codes[32 * 32];
  alignas(16) static float scales[32];
  alignas(16) static std::uint16_t x[8 * 16], u[32 * 16], d[8 * 32];
  const ConstRowScaledView a{codes, scales, 8, 32}, b{codes, scales, 32, 32};
  const auto reason = [&](const LowRankAddend& addend, void* target) {
    try {
      const MatrixView result{target, DType::kBFloat16, 8, 32, 32};
      gemm(find_gemm_kernel("fp8_sm90"), {a, b, nullptr, result, {}, addend}, {}, CudaStream{});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    } catch (const Error&) {
      return std::string("of the device");
    }
    return std::string();
  };
  const auto bf16 = [](const void* data, std::int64_t rows, std::int64_t cols) {
    return ConstMatrixView{data, DType::kBFloat16, rows, cols, cols};
  };
  CHECK(reason({bf16(x, 7, 16), bf16(u, 32, 16)}, d) ==
        "the addend's X must be BF16 [8, 16], not empty");
  CHECK(reason({bf16(x, 8, 16), bf16(u, 32, 8)}, d) ==
        "the addend's U must be BF16 [32, 16], not empty");
  CHECK(reason({bf16(x, 8, 0), bf16(u, 32, 0)}, d) ==
        "the addend's X must be BF16 [8, 0], not empty");
  CHECK(reason({bf16(d, 8, 16), bf16(u, 32, 16)}, d) == "D overlaps with the addend's X");
  CHECK_THROWS_WITH_AS(
      narrow_gemm(a, b, scales, MatrixView{d, DType::kBFloat16, 8, 16, 16}, CudaStream{}),
      "B is [32, 32]: it must have 32 columns and a multiple of 64 rows", InvalidArgument);
}

TEST_CASE("host memory is refused where a device's is needed") {
  // Without CUDA, without a device or with one: a typed error each time, and nothing is touched.
  std::vector<float> source(32 * 32, 1.0f), d(32 * 32);
  alignas(16) static std::uint8_t codes[1024], scales[512];
  const ConstMatrixView view{source.data(), DType::kFloat32, 32, 32, 32};
  const CudaStream stream;
  CHECK_THROWS_AS(quantize(view, MXFP8View{codes, scales, 32, 32}, stream), Error);
  CHECK_THROWS_AS(dequantize(ConstMXFP8View{codes, scales, 32, 32},
                             MatrixView{d.data(), DType::kFloat32, 32, 32, 32}, stream),
                  Error);
  RowScaled rows(32, 32);
  CHECK_THROWS_AS(quantize_rows(view, rows.view(), stream), Error);
  const ConstMXFP8View operand{codes, scales, 32, 32};
  CHECK_THROWS_AS(
      gemm(find_gemm_kernel("reference"),
           {operand, operand, nullptr, MatrixView{d.data(), DType::kFloat32, 32, 32, 32}}, {},
           stream),
      Error);
  CHECK_THROWS_AS(quantize(view, MXFP8View{codes + 1, scales, 32, 31}, stream), InvalidArgument);
  CHECK_THROWS_AS(quantize(view, MXFP8View{codes + 1, scales, 32, 32}, stream), InvalidArgument);
}

TEST_CASE("alignment is asked of elements only") {
  // The memory below is the host's, so every call is refused; what matters is the reason.
  const auto reason = [](std::int64_t k, std::int64_t a_row_stride, const std::uint16_t* a) {
    alignas(16) static std::uint16_t d[3 * 8];
    alignas(16) static std::uint8_t codes[32 * 32], scales[512];
    try {
      gemm(find_gemm_kernel("mixed_sm90"),
           {ConstMatrixView{a, DType::kBFloat16, 3, k, a_row_stride},
            ConstMXFP8View{codes, scales, 8, k}, nullptr, MatrixView{d, DType::kBFloat16, 3, 8, 8}},
           {}, CudaStream{});
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  alignas(16) static const std::uint16_t a[3 * 40]{};
  const auto is_of_alignment = [](const std::string& text) {
    CHECK(!text.empty());
    return text.find("16 bytes") != std::string::npos;
  };
  CHECK(is_of_alignment(reason(32, 33, a)));
  CHECK(is_of_alignment(reason(32, 32, a + 1)));
  CHECK(!is_of_alignment(reason(32, 40, a)));
  CHECK(!is_of_alignment(reason(0, 1, a)));
  CHECK(!is_of_alignment(reason(0, 1, a + 1)));
}

TEST_CASE("bounds of folding that are none") {
  const Encoded source(ramp(2, 64, 0.4), 2, 64);
  RowScaled folded(2, 64);
  CHECK_THROWS_AS(fold(source.view(), folded.view(), -1.0), InvalidArgument);
  CHECK_THROWS_AS(fold(source.view(), folded.view(), std::nan("")), InvalidArgument);
}

TEST_CASE("memory that is written overlaps with nothing") {
  std::vector<float> memory(4096);
  auto* bytes = reinterpret_cast<std::uint8_t*>(memory.data());
  std::vector<std::uint8_t> scales(512);
  const ConstMatrixView source{memory.data(), DType::kFloat32, 32, 32, 32};
  CHECK_THROWS_AS(quantize(source, MXFP8View{bytes + 100, scales.data(), 32, 32}), InvalidArgument);
  CHECK_NOTHROW(quantize(source, MXFP8View{bytes + 4096, scales.data(), 32, 32}));
  CHECK_THROWS_AS(dequantize(ConstMXFP8View{bytes, scales.data(), 32, 32},
                             MatrixView{memory.data(), DType::kFloat32, 32, 32, 32}),
                  InvalidArgument);
}

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
  RotateHeads epilogue{
      memory.weight, memory.weight, {memory.rotations, DType::kFloat32, 16, 128, 128}, 1, 1, 1e-5f};
  MatrixView target{memory.target, DType::kBFloat16, 16, 384, 384};

  void rotate() const {
    gemm(find_gemm_kernel("fp8_sm90"), {a, b, nullptr, target, epilogue}, {}, CudaStream{});
  }
  void gate() const {
    gemm(find_gemm_kernel("fp8_sm90"), {a, b, nullptr, target, SiluMultiply{}}, {}, CudaStream{});
  }
};

}  // namespace

TEST_CASE("arguments of an epilogue that do not go together") {
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
  refuses([](Call& c) { c.epilogue.q_heads = 3; });
  refuses([](Call& c) { c.epilogue.k_heads = -1; });
  refuses([](Call& c) { c.epilogue.eps = -1.0f; });
  refuses([](Call& c) { c.epilogue.eps = std::nanf(""); });
  refuses([](Call& c) { c.epilogue.q_weight = nullptr; });
  refuses([](Call& c) { c.epilogue.q_weight = memory.weight + 1; });
  refuses([](Call& c) { c.epilogue.rotations.rows = 15; });
  refuses([](Call& c) { c.epilogue.rotations.row_stride = 129; });
  refuses([](Call& c) { c.epilogue.rotations.row_stride = std::int64_t{1} << 62; });
  refuses([](Call& c) { c.target.cols = 376; });
  refuses([](Call& c) { c.target.row_stride = 385; });
  refuses([](Call& c) { c.target.row_stride = std::int64_t{1} << 62; });
  refuses([](Call& c) { c.target.row_stride = INT64_MAX - 7; });
  refuses([](Call& c) { c.target.dtype = DType::kFloat16; });
  refuses([](Call& c) { c.target.data = memory.a; });

  Call call;
  call.target.cols = 192;
  CHECK_THROWS_AS(call.gate(), Error);
  call.target.cols = 191;
  CHECK_THROWS_AS(call.gate(), InvalidArgument);
  call.b.rows = 376;  // not a multiple of 16
  call.target.cols = 188;
  CHECK_THROWS_AS(call.gate(), InvalidArgument);
}
