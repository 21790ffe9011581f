// Blocks on a CUDA device; skipped where there is none.
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "block_example.h"
#include "zimage_mxfp8/attention.h"
#include "zimage_mxfp8/cast.h"
#include "zimage_mxfp8/error.h"

using namespace zimage_mxfp8;
using block_example::at, block_example::Example, block_example::Plain,
    block_example::relative_error, block_example::Sizes;

namespace {

void check(cudaError_t status) { REQUIRE(status == cudaSuccess); }

class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)));
    check(cudaMemset(data_, 0xFF, bytes));  // NaN for whoever reads what nobody wrote
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  Workspace workspace() const { return {data_, bytes_}; }
  void fill(const void* source) { check(cudaMemcpy(data_, source, bytes_, cudaMemcpyDefault)); }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// A matrix in BF16 on the device.
struct Matrix {
  std::int64_t rows, cols;
  Memory memory;

  explicit Matrix(const Plain& plain)
      : rows(plain.rows), cols(plain.cols), memory(at(rows * cols * 2)) {
    std::vector<std::uint16_t> narrow(at(rows * cols));
    cast(plain.view(), {narrow.data(), DType::kBFloat16, rows, cols, cols});
    memory.fill(narrow.data());
  }
  MatrixView view() const { return {memory.data(), DType::kBFloat16, rows, cols, cols}; }
  ConstMatrixView const_view() const { return {memory.data(), DType::kBFloat16, rows, cols, cols}; }
  std::vector<float> values() const {
    std::vector<std::uint16_t> narrow(at(rows * cols));
    std::vector<float> wide(narrow.size());
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(narrow.data(), memory.data(), narrow.size() * 2, cudaMemcpyDefault));
    cast({narrow.data(), DType::kBFloat16, rows, cols, cols},
         {wide.data(), DType::kFloat32, rows, cols, cols});
    return wide;
  }
};

bool skipped() {
  if (!cuda_devices().empty()) return false;
  MESSAGE("skipped: there is no CUDA device");
  return true;
}

// Without cuBLASLt no kernel multiplies some of these operands fast.
bool skipped_without_cublaslt() {
  if (skipped()) return true;
  if (!cublaslt_version().empty()) return false;
  MESSAGE("skipped: there is no cuBLASLt");
  return true;
}

// Whether the device multiplies in this way.
bool is_fast(BlockCompute compute) {
  return compute != BlockCompute::kFP8 ||
         (cuda_devices()[0].major == 9 && cuda_devices()[0].minor == 0);
}

std::vector<float> run(const Example& example, const Sizes& sizes, BlockCompute compute,
                       const DeviceAttention& attention = {}) {
  const BlockWeights weights = example.weights();
  const Memory memory(DeviceBlock::memory_size(weights, compute));
  const DeviceBlock block(weights, compute, memory.workspace());
  const Memory workspace(block.workspace_size(example.tokens(), example.items()));
  const Matrix x(example.x()), conditioning(example.conditioning());
  Memory rotations(example.rotations().size() * sizeof(float));
  rotations.fill(example.rotations().data());
  std::vector<std::int32_t> items;
  for (std::size_t item = 0; item < sizes.lengths.size(); ++item) {
    items.insert(items.end(), at(sizes.lengths[item]), static_cast<std::int32_t>(item));
  }
  Memory device_items(items.size() * sizeof(std::int32_t));
  device_items.fill(items.data());
  BlockInput input = example.input();
  input.rotations.data = rotations.data();
  if (input.conditioning) input.conditioning = conditioning.const_view();
  if (sizes.lengths.size() > 1) input.items = static_cast<const std::int32_t*>(device_items.data());
  block.run(input, x.view(), workspace.workspace(), {}, attention);
  return x.values();
}

}  // namespace

TEST_CASE("a block on a device is the formula of block.h") {
  if (skipped_without_cublaslt()) return;
  const Sizes cases[] = {
      {2, 256, 64, {3, 40}},      // w1 and w3 are one GEMM
      {2, 160, 64, {33}},         // two, as 160 is not a multiple of 128
      {2, 256, 0, {70}},          // not modulated
      {2, 256, 64, {50}, false},  // w3 is not quantised
  };
  const struct {
    BlockCompute compute;
    double bound;  // of the relative error: rounding to BF16, or of activations to 8 bits
  } ways[] = {
      {BlockCompute::kWeightOnly, 0.01}, {BlockCompute::kFP8, 0.07}, {BlockCompute::kMXFP8, 0.07}};
  for (const Sizes& sizes : cases) {
    const Example example(sizes);
    const block_example::Values expected = example.expected();
    for (const auto& way : ways) {
      if (!is_fast(way.compute)) continue;
      CAPTURE(static_cast<int>(way.compute));
      CAPTURE(sizes.hidden);
      CHECK(relative_error(run(example, sizes, way.compute), expected) < way.bound);
    }
  }
}

TEST_CASE("a program's own attention takes the place of attend()") {
  if (skipped_without_cublaslt()) return;
  const Sizes sizes{2, 256, 64, {3, 40}};
  const Example example(sizes);
  int calls = 0;
  const auto own = [&](const ConstMatrixView& qkv, std::int64_t heads,
                       const std::vector<std::int64_t>& lengths, const MatrixView& out,
                       CudaStream stream) {
    ++calls;
    attend(qkv, heads, lengths, out, stream);
  };
  CHECK(run(example, sizes, BlockCompute::kWeightOnly, own) ==
        run(example, sizes, BlockCompute::kWeightOnly));
  CHECK(calls == 1);
}

TEST_CASE("attention on a device equals that on the CPU") {
  if (skipped()) return;
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{1}, {31, 0, 33}, {200}}) {
    std::int64_t tokens = 0;
    for (const std::int64_t length : lengths) tokens += length;
    std::mt19937 random(1);
    const Plain qkv(random, tokens, 3 * 256, 0, 1), zeros(random, tokens, 256, 0, 0);
    std::vector<float> expected(at(tokens * 256));
    attend(qkv.view(), 2, lengths, {expected.data(), DType::kFloat32, tokens, 256, 256});
    const Matrix device_qkv(qkv), out(zeros);
    attend(device_qkv.const_view(), 2, lengths, out.view(), CudaStream{});
    CHECK(relative_error(out.values(), {expected.begin(), expected.end()}) < 0.003);
  }
}

TEST_CASE("a block on a device refuses what does not fit") {
  if (skipped()) return;
  const Example example({1, 96, 0, {3}}), odd({1, 75, 64, {3}});
  const BlockWeights weights = example.weights();
  CHECK_THROWS_AS(DeviceBlock::memory_size(odd.weights(), BlockCompute::kWeightOnly), Unsupported);
  const std::size_t bytes = DeviceBlock::memory_size(weights, BlockCompute::kWeightOnly);
  const Memory memory(bytes);
  CHECK_THROWS_AS(
      DeviceBlock(weights, BlockCompute::kWeightOnly, Workspace{memory.data(), bytes - 1}),
      InvalidArgument);
  std::vector<char> host(bytes + 256);
  CHECK_THROWS_AS(DeviceBlock(weights, BlockCompute::kWeightOnly, Workspace{host.data(), bytes}),
                  InvalidArgument);
  const DeviceBlock block(weights, BlockCompute::kWeightOnly, memory.workspace());
  const Matrix x(example.x());
  CHECK_THROWS_WITH_AS(block.run(example.input(), x.view(), {}, {}),
                       doctest::Contains("the workspace has 0 bytes"), InvalidArgument);
}
