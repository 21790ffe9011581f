#include <doctest/doctest.h>

#include <cmath>
#include <string>

#include "block_example.h"
#include "zimage_mxfp8/attention.h"
#include "zimage_mxfp8/error.h"

using namespace zimage_mxfp8;
using block_example::at, block_example::Example, block_example::relative_error,
    block_example::Sizes;

namespace {

std::vector<float> run(const Example& example, int threads) {
  std::vector<float> x = example.x().values;
  run_block(example.weights(), example.input(),
            {x.data(), DType::kFloat32, example.tokens(), example.width(), example.width()},
            threads);
  return x;
}

}  // namespace

TEST_CASE("a block on the CPU is the formula of block.h") {
  const Sizes cases[] = {
      {2, 160, 64, {3, 5}},     // modulated, two items
      {2, 160, 0, {7}},         // not modulated
      {1, 75, 50, {4, 0, 2}},   // sizes that are no multiples of 32, an empty item
      {1, 96, 64, {70}},        // more tokens than are computed together
      {1, 96, 64, {3}, false},  // w3 is not quantised
  };
  for (const Sizes& sizes : cases) {
    const Example example(sizes);
    const std::vector<float> found = run(example, 1);
    CHECK(relative_error(found, example.expected()) < 2e-6);
    CHECK(found == run(example, 3));
  }
}

TEST_CASE("a block without tokens does nothing") {
  const Example example({1, 96, 64, {}});
  CHECK(run(example, 1).empty());
}

TEST_CASE("rotations are the angles of each axis") {
  const std::int32_t positions[] = {0, 0, 0, 3, 100, 7};
  std::vector<float> rotations(2 * 128);
  compute_rotations(positions, 2, rotations.data());
  for (std::size_t pair = 0; pair < 64; ++pair) {
    CHECK(rotations[2 * pair] == 1.0f);
    CHECK(rotations[2 * pair + 1] == 0.0f);
    const std::size_t axis = pair < 16 ? 0 : pair < 40 ? 1 : 2;
    const double size = axis == 0 ? 32 : 48;
    const std::size_t first = axis == 0 ? 0 : axis == 1 ? 16 : 40;
    const double angle =
        positions[3 + axis] / std::pow(256.0, 2 * static_cast<double>(pair - first) / size);
    CHECK(rotations[128 + 2 * pair] == doctest::Approx(std::cos(angle)).epsilon(1e-5));
    CHECK(rotations[128 + 2 * pair + 1] == doctest::Approx(std::sin(angle)).epsilon(1e-5));
  }
}

TEST_CASE("a block refuses inputs that do not fit") {
  const Example example({1, 96, 64, {3, 5}});
  const BlockWeights block = example.weights();
  std::vector<float> x = example.x().values;
  const MatrixView view{x.data(), DType::kFloat32, 8, 128, 128};
  const auto refuses = [&](const BlockInput& input, const MatrixView& matrix, const char* part) {
    std::string error;
    try {
      run_block(block, input, matrix);
    } catch (const InvalidArgument& caught) {
      error = caught.what();
    }
    CAPTURE(error);
    CHECK(error.find(part) != error.npos);
  };
  BlockInput input = example.input();
  input.lengths = {3, 4};
  refuses(input, view, "lengths are 7 tokens");
  input.lengths = {9, -1};
  refuses(input, view, "lengths must be 0 or more");
  input.lengths = {8};
  refuses(input, view, "conditioning must be [1, 64], not [2, 64]");
  input = example.input();
  input.conditioning.reset();
  refuses(input, view, "needs a conditioning");
  input = example.input();
  input.rotations.cols = 64;
  refuses(input, view, "rotations must be [8, 128]");
  refuses(example.input(), {x.data(), DType::kFloat32, 8, 64, 128}, "x must be [8, 128]");
  refuses(example.input(), {x.data(), DType::kBFloat16, 8, 128, 128}, "x must be float32");
  refuses(example.input(), {nullptr, DType::kFloat32, 8, 128, 128}, "null pointer");
}

TEST_CASE("a block refuses weights that do not fit") {
  const Example example({1, 96, 64, {3, 5}});
  std::vector<float> x = example.x().values;
  const auto refused = [&](auto change) {
    BlockWeights block = example.weights();
    change(block);
    try {
      run_block(block, example.input(), {x.data(), DType::kFloat32, 8, 128, 128});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const auto rows = [](LinearWeights& linear, std::int64_t count) {
    std::visit([&](auto& view) { view.rows = count; }, linear.weight);
  };
  CHECK(refused([&](BlockWeights& b) { rows(b.w3, 48); }) == "w3 must be [96, 128], not [48, 128]");
  CHECK(refused([&](BlockWeights& b) { rows(b.qkv, 128); }) ==
        "qkv must be [384, 128], not [128, 128]");
  CHECK(refused([](BlockWeights& b) { b.heads = 2; }) ==
        "a block of width 128 cannot have 2 heads of 128");
  CHECK(refused([](BlockWeights& b) { b.ffn_norm1.cols = 64; }) ==
        "ffn_norm1 must be [1, 128], not [1, 64]");
  CHECK(refused([](BlockWeights& b) { b.k_norm.data = nullptr; }) == "k_norm is a null pointer");
  CHECK(refused([](BlockWeights&) {}).empty());
}

TEST_CASE("attention refuses matrices that do not fit") {
  std::vector<float> qkv(4 * 384), out(4 * 128);
  const ConstMatrixView from{qkv.data(), DType::kFloat32, 4, 384, 384};
  const MatrixView to{out.data(), DType::kFloat32, 4, 128, 128};
  attend(from, 1, {1, 3}, to);
  CHECK_THROWS_AS(attend(from, 2, {4}, to), InvalidArgument);
  CHECK_THROWS_AS(attend(from, 1, {3}, to), InvalidArgument);
  CHECK_THROWS_AS(attend(from, 1, {5, -1}, to), InvalidArgument);
  CHECK_THROWS_AS(attend(from, 1, {4}, {out.data(), DType::kFloat32, 4, 64, 128}), InvalidArgument);
  CHECK_THROWS_AS(attend(from, 1, {4}, {qkv.data(), DType::kFloat32, 4, 128, 128}),
                  InvalidArgument);
  CHECK_THROWS_AS(attend({qkv.data(), DType::kBFloat16, 4, 384, 384}, 1, {4}, to), InvalidArgument);
}
