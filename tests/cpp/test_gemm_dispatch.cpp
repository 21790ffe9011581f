// The choice of GEMM kernels: pinned for the shapes of Z-Image, and with a made-up kernel.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "gemm/dispatch/dispatch.h"
#include "gemm/dispatch/heuristics.h"
#include "gemm/sm90/fused_order.h"
#include "zimage_mxfp8/error.h"

using namespace zimage_mxfp8;

namespace {

constexpr auto kBF16 = OperandFormat::kBFloat16;
constexpr auto kMX = OperandFormat::kMXFP8;
constexpr auto kRows = OperandFormat::kRowScaled;
constexpr auto kInt8 = OperandFormat::kInt8;
constexpr auto kNone = GemmEpilogue::kNone;
constexpr auto kSilu = GemmEpilogue::kSiluMultiply;
constexpr auto kRotate = GemmEpilogue::kRotateHeads;

const CudaDevice kH100{0, "H100", 9, 0, 132, std::size_t{80} << 30};
const CudaDevice kA100{0, "A100", 8, 0, 108, std::size_t{80} << 30};
const CudaDevice kB200{0, "B200", 10, 0, 148, std::size_t{180} << 30};
const CudaDevice kRTX5090{0, "RTX 5090", 12, 0, 170, std::size_t{32} << 30};

// Kernels as in a build that has them all, with every library there.
class Built {
 public:
  explicit Built(std::vector<GemmKernel> more = {}) {
    for (const GemmKernel& kernel : detail::gemm_table()) kernels_.push_back(kernel);
    kernels_.insert(kernels_.end(), more.begin(), more.end());
    for (GemmKernel& kernel : kernels_) {
      if (kernel.implementation->available) kernel.implementation = &kAvailable;
    }
  }
  detail::GemmTable table() const { return {kernels_.data(), kernels_.data() + kernels_.size()}; }

  std::string choice(const GemmProblem& problem, const CudaDevice& device,
                     const std::string& forced = "") const {
    const auto candidates = detail::explain(table(), problem, &device, forced);
    const GemmCandidate& first = candidates.front();
    if (!first.reason.empty()) {
      CHECK_THROWS_AS(detail::choose(table(), problem, &device, forced), Unsupported);
      return "none";
    }
    CHECK(&detail::choose(table(), problem, &device, forced) == first.kernel);
    return std::string(first.kernel->name) + (first.fuses_epilogue ? "" : " + launch");
  }

 private:
  static const detail::GemmImplementation kAvailable;
  std::vector<GemmKernel> kernels_;
};

const detail::GemmImplementation Built::kAvailable{nullptr, nullptr, nullptr};

GemmProblem problem(std::int64_t m, std::int64_t n, std::int64_t k, OperandFormat a,
                    OperandFormat b, GemmEpilogue epilogue = kNone) {
  return {m, n, k, a, b, DType::kBFloat16, false, epilogue, kBF16};
}

}  // namespace

TEST_CASE("the kernel for each shape") {
  struct Row {
    const CudaDevice& device;
    GemmProblem problem;
    const char* kernel;
  };
  // qkv [11520, 3840], out [3840, 3840], w1 and w3 [20480, 3840], w2 [3840, 10240], modulation
  // [15360, 256]; tokens of 512x512 to 2048x2048 pixels.
  const std::vector<Row> rows{
      {kH100, problem(1, 15360, 256, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(128, 3840, 3840, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(1023, 11520, 3840, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(1024, 11520, 3840, kBF16, kMX), "dequantize"},
      {kH100, problem(1152, 20480, 3840, kBF16, kMX), "dequantize"},
      {kH100, problem(2047, 11520, 3840, kBF16, kMX), "dequantize"},
      {kH100, problem(2048, 11520, 3840, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(2048, 3840, 3840, kBF16, kMX), "dequantize"},
      {kH100, problem(4095, 3840, 10240, kBF16, kMX), "dequantize"},
      {kH100, problem(4096, 3840, 10240, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(4224, 11520, 3840, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(4224, 20480, 3840, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(8191, 3840, 3840, kBF16, kMX), "mixed_sm90"},
      {kH100, problem(8192, 3840, 3840, kBF16, kMX), "dequantize"},
      {kH100, problem(16512, 20480, 3840, kBF16, kMX), "dequantize"},
      {kH100, problem(4224, 3840, 3840, kMX, kMX), "dequantize"},
      {kH100, problem(4224, 3840, 3840, kBF16, kBF16), "dequantize"},
      {kH100, problem(4224, 3840, 3840, kRows, kRows), "fp8_rowwise"},
      {kH100, problem(1, 3840, 3840, kRows, kRows), "fp8_rowwise"},
      {kH100, problem(4224, 20480, 3840, kRows, kRows, kSilu), "fp8_sm90"},
      {kH100, problem(4224, 11520, 3840, kRows, kRows, kRotate), "fp8_sm90"},
      {kH100, problem(16512, 20480, 3840, kRows, kRows, kSilu), "fp8_sm90"},
      {kH100, problem(1152, 20480, 3840, kRows, kRows, kSilu), "fp8_sm90"},
      {kH100, problem(1152, 11520, 3840, kRows, kRows, kRotate), "fp8_rowwise + launch"},
      {kH100, problem(128, 20480, 3840, kRows, kRows, kSilu), "fp8_rowwise + launch"},
      {kH100, problem(1, 20480, 3840, kRows, kRows, kSilu), "fp8_rowwise + launch"},
      {kH100, problem(2112, 20480, 3840, kRows, kRows, kSilu), "fp8_sm90"},
      {kH100, problem(576, 20480, 3840, kRows, kRows, kSilu), "fp8_rowwise + launch"},
      {kH100, problem(1088, 11520, 3840, kRows, kRows, kRotate), "fp8_rowwise + launch"},
      {kH100, problem(4224, 20480, 3840, kBF16, kMX, kSilu), "mixed_sm90 + launch"},
      {kH100, problem(4224, 3840, 10240, kInt8, kInt8), "int8_sm90"},
      {kH100, problem(1, 20480, 3840, kInt8, kInt8, kSilu), "int8_sm90"},
      {kH100, problem(1152, 11520, 3840, kInt8, kInt8, kRotate), "int8_sm90"},
      {kH100, problem(1152, 3840, 3840, kInt8, kMX), "none"},
      {kA100, problem(4224, 3840, 10240, kInt8, kInt8), "int8_sm80"},
      {kA100, problem(4224, 20480, 3840, kInt8, kInt8, kSilu), "int8_sm80 + launch"},
      {kRTX5090, problem(4224, 11520, 3840, kInt8, kInt8, kRotate), "int8_sm80 + launch"},
      {kA100, problem(4224, 3840, 3840, kBF16, kMX), "dequantize"},
      {kA100, problem(4224, 3840, 3840, kMX, kMX), "dequantize"},
      {kA100, problem(4224, 3840, 3840, kRows, kRows), "none"},
      {kB200, problem(4224, 3840, 3840, kMX, kMX), "mxfp8_sm100"},
      {kB200, problem(4224, 3840, 3840, kBF16, kMX), "dequantize"},
      {kRTX5090, problem(4224, 3840, 3840, kMX, kMX), "mxfp8_sm120"},
      {kRTX5090, problem(4224, 3840, 3840, kRows, kRows), "none"},
  };
  const Built built;
  for (const Row& row : rows) {
    CAPTURE(detail::problem_text(row.problem));
    CHECK(built.choice(row.problem, row.device) == row.kernel);
  }
}

TEST_CASE("a fused epilogue needs full waves") {
  // Units of 128 x 256 tiles on 66 clusters of an H100, counted by hand: 17 x 45 are 765 in 12
  // waves of 792 slots; 4 x 45 and 23 of the last row are 203 in 4 waves of 264.
  CHECK(detail::fused_order(4300, 45, 66).units() == 765);
  CHECK(detail::fused_order(1152, 45, 66).units() == 203);
  CHECK(detail::fused_order(1, 1, 66).units() == 1);
  CHECK(detail::cost_fp8_sm90(problem(4300, 11520, 3840, kRows, kRows, kRotate), kH100) ==
        doctest::Approx(0.85 / (765.0 / 792)));
  CHECK(detail::cost_fp8_sm90(problem(1152, 11520, 3840, kRows, kRows, kRotate), kH100) ==
        doctest::Approx(0.85 / (203.0 / 264)));
  // 660 units are 10 waves; a unit of halves counts as two, which makes them 11.
  CHECK(detail::cost_fp8_sm90(problem(2112, 20480, 3840, kRows, kRows, kSilu), kH100) ==
        doctest::Approx(0.85 / (660.0 / 726)));
}

TEST_CASE("variants within a kernel") {
  // On 66 clusters: 9 x 7 + 5 pairs of tiles of 256 rows in 2 waves, 9 x 10 of 192 in 2;
  // 33 x 7 + 17 in 4, 33 x 10 in 5; 33 x 22 + 17 in 12, 33 x 30 in 15; 5 x 7 + 3 in 1, 5 x 10 in 1.
  CHECK(detail::int8_sm90_takes_narrow_tiles(1152, 3840, 132));
  CHECK(detail::int8_sm90_takes_narrow_tiles(4224, 3840, 132));
  CHECK(detail::int8_sm90_takes_narrow_tiles(4224, 11520, 132));
  CHECK(detail::int8_sm90_takes_narrow_tiles(640, 3840, 132));
  CHECK(!detail::int8_sm90_takes_narrow_tiles(1024, 4096, 132));  // 8 x 8 in 1, 8 x 11 in 2
  CHECK(!detail::mixed_sm90_uses_workspace(2047));
  CHECK(detail::mixed_sm90_uses_workspace(2048));
  using Register = detail::MixedRegisterTile;
  CHECK(detail::mixed_register_tile(32, 3840, 132) == Register::k32x64);  // 30 tiles of 128
  CHECK(detail::mixed_register_tile(33, 3840, 132) == Register::k64x64);
  CHECK(detail::mixed_register_tile(128, 3840, 132) == Register::k128x64);
  CHECK(detail::mixed_register_tile(1, 11520, 132) == Register::k64x128);  // 90 tiles
  CHECK(detail::mixed_register_tile(65, 11520, 132) == Register::k128x128);
  CHECK(detail::mixed_register_tile(129, 3840, 132) == Register::k192x128);
  // 22 rows of tiles on 66 clusters: 3840 = 15 slabs of 256, 330 tiles in 5 waves of 128; 10 slabs
  // of 384, 220 tiles in 4 waves of 192. 20480: 80, 27 waves of 128; 54, 18 waves of 192.
  using Workspace = detail::MixedWorkspaceTile;
  CHECK(detail::mixed_workspace_tile(4224, 3840, 132) == Workspace::k128);   // 640 against 768
  CHECK(detail::mixed_workspace_tile(4224, 20480, 132) == Workspace::k192);  // 3456, 3456
  CHECK(detail::sm100_tile(128, 20480, 148) == detail::SM100Tile::k128x128);
  CHECK(detail::sm100_tile(1152, 3840, 148) == detail::SM100Tile::k256x128);   // 75 tiles
  CHECK(detail::sm100_tile(4224, 11520, 148) == detail::SM100Tile::k256x256);  // 765 tiles
}

TEST_CASE("a made-up kernel is chosen, refused with its reason, and listed") {
  static const detail::GemmImplementation nothing{nullptr, nullptr, nullptr};
  const GemmKernel made_up{
      "made_up",
      detail::operands(kRows, kRows),
      detail::output(DType::kBFloat16),
      detail::epilogue(kNone) | detail::epilogue(kSilu),
      detail::epilogue(kNone),
      false,
      {90},
      false,
      &nothing,
      [](const GemmProblem& p, const CudaDevice&) { return p.m < 1000 ? 0.5 : 2.0; }};
  const Built built({made_up});
  const GemmProblem few = problem(128, 20480, 3840, kRows, kRows),
                    many = problem(4224, 20480, 3840, kRows, kRows);

  CHECK(built.choice(few, kH100) == "made_up");
  CHECK(built.choice(problem(128, 20480, 3840, kRows, kRows, kSilu), kH100) == "made_up");
  CHECK(built.choice(problem(128, 11520, 3840, kRows, kRows, kRotate), kH100) ==
        "made_up + launch");
  CHECK(built.choice(many, kH100) == "fp8_rowwise");
  CHECK(built.choice(many, kH100, "made_up") == "made_up");
  CHECK(built.choice(problem(128, 3840, 3840, kBF16, kMX), kH100, "made_up") == "mixed_sm90");

  const auto reason = [&](const GemmProblem& p, const CudaDevice* device) {
    for (const GemmCandidate& one : detail::explain(built.table(), p, device, "")) {
      if (one.kernel->name == std::string("made_up")) return one.reason;
    }
    return std::string("not listed");
  };
  CHECK(reason(few, &kH100).empty());
  CHECK(reason(many, &kH100) == "made_up has cost 2.00, fp8_rowwise 1.00");
  CHECK(reason(few, &kA100) ==
        "made_up needs compute capability 9.0, and this is A100 (compute capability 8.0)");
  CHECK(reason(few, nullptr) == "made_up needs a CUDA device");
  CHECK(reason(problem(128, 3840, 3840, kBF16, kMX), &kH100) ==
        "made_up multiplies row-scaled FP8 x row-scaled FP8, not BF16 x MXFP8");
  GemmProblem wide = few;
  wide.d = DType::kFloat32;
  CHECK(reason(wide, &kH100) == "made_up does not write F32");
  GemmProblem biased = few;
  biased.bias = true;
  CHECK(reason(biased, &kH100) == "made_up adds no bias");
  CHECK(built.choice(biased, kH100) == "fp8_rowwise");
  GemmProblem sum = few;
  sum.addend_rank = 32;
  CHECK(built.choice(sum, kH100) == "made_up");
  sum.m = 4224;
  CHECK(built.choice(sum, kH100) == "fp8_sm90");
  CHECK(detail::problem_text(sum) ==
        "4224x20480x3840 row-scaled FP8 x row-scaled FP8 -> BF16 with an addend of rank 32");
  GemmProblem mixed_sum = problem(4224, 3840, 3840, kBF16, kMX);
  mixed_sum.addend_rank = 32;
  CHECK(built.choice(mixed_sum, kH100) == "mixed_sm90");
  GemmProblem int8_sum = problem(4224, 20480, 3840, kInt8, kInt8, kSilu);
  int8_sum.addend_rank = 32;
  CHECK(built.choice(int8_sum, kH100) == "int8_sm90");
  CHECK(built.choice(int8_sum, kA100) == "none");

  const std::string line =
      detail::log_line(few, &kH100, detail::explain(built.table(), few, &kH100, ""));
  CHECK(line.find("128x20480x3840 row-scaled FP8 x row-scaled FP8 -> BF16 on H100 (compute "
                  "capability 9.0): made_up (cost 0.50); ") == 0);
  CHECK(line.find("fp8_rowwise has cost 1.00, made_up 0.50") != std::string::npos);
  CHECK(line.find("reference runs there, slowly, if chosen by name") != std::string::npos);
}

TEST_CASE("where no kernel is fast, the error has every reason") {
  const Built built;
  try {
    detail::choose(built.table(), problem(64, 64, 64, kRows, kRows), &kA100, "");
    FAIL("chosen");
  } catch (const Unsupported& error) {
    const std::string text = error.what();
    CHECK(text.find("no fast kernel for row-scaled FP8 x row-scaled FP8 on A100 (compute "
                    "capability 8.0)") == 0);
    for (const GemmKernel& kernel : built.table()) {
      CHECK(text.find(kernel.name) != std::string::npos);
    }
  }
}

TEST_CASE("operands that no kernel multiplies are told in one clause") {
  const Built built;
  for (const CudaDevice* device : {static_cast<const CudaDevice*>(nullptr), &kH100}) {
    CHECK_THROWS_WITH_AS(
        detail::choose(built.table(), problem(64, 64, 64, kBF16, kInt8), device, ""),
        "no kernel multiplies BF16 x INT8; encode both operands in one format", Unsupported);
  }
}

TEST_CASE("what a build does not have is told by its kernels") {
  const auto missing = [](const char* name, const GemmProblem& p, const CudaDevice& device) {
    return detail::supports_on(find_gemm_kernel(name), p, &device);
  };
  const std::vector<std::string> built = build_info().architectures;
  const bool has_sm90 = std::find(built.begin(), built.end(), "90a") != built.end();
  const Support support = missing("mixed_sm90", problem(8, 8, 32, kBF16, kMX), kH100);
  CHECK(support.ok == has_sm90);
  if (!has_sm90) CHECK(support.reason.find("rebuild it with 90a") != std::string::npos);
}
