// Runs one block of Z-Image's transformer on the tokens of a file, on the CPU in float32 or on the
// GPU.
//
//   cmake -B build -Dzimage_mxfp8_DIR="$(zimage-mxfp8 --cmake-dir)" && cmake --build build
//   build/block CHECKPOINT BLOCK INPUT OUTPUT [cpu|weight-only|fp8|mxfp8]
//
// CHECKPOINT is an MXFP8 or a plain checkpoint in ComfyUI's layout, BLOCK a name such as layers.0.
// INPUT is a safetensors file with x F32 [M, D], positions I32 [M, 3] and, for a block with a
// modulation, conditioning F32 [1, C]. OUTPUT gets x.
#include <zimage_mxfp8/block.h>
#include <zimage_mxfp8/cast.h>
#include <zimage_mxfp8/checkpoint.h>
#include <zimage_mxfp8/error.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>

#include <optional>
#endif

namespace zm = zimage_mxfp8;

namespace {

struct Tokens {
  zm::ConstMatrixView x;
  std::vector<float> rotations;
  zm::BlockInput input;  // in host memory

  explicit Tokens(const zm::Checkpoint& file) : x(zm::matrix_view(file.tensor("x"))) {
    const zm::CheckpointTensor& tensor = file.tensor("positions");
    if (tensor.dtype != "I32" || tensor.shape != std::vector<std::int64_t>{x.rows, 3}) {
      throw std::runtime_error("positions must be I32 [M, 3]");
    }
    std::vector<std::int32_t> positions(static_cast<std::size_t>(x.rows * 3));
    std::memcpy(positions.data(), tensor.data, positions.size() * sizeof(positions[0]));
    rotations.resize(static_cast<std::size_t>(x.rows * zm::kHeadSize));
    zm::compute_rotations(positions.data(), x.rows, rotations.data());
    input.rotations = {rotations.data(), zm::DType::kFloat32, x.rows, zm::kHeadSize, zm::kHeadSize};
    input.lengths = {x.rows};
    if (file.tensors().count("conditioning")) {
      input.conditioning = zm::matrix_view(file.tensor("conditioning"));
    }
  }
};

std::vector<float> run_on_cpu(const zm::BlockWeights& weights, const Tokens& tokens) {
  std::vector<float> x(static_cast<std::size_t>(tokens.x.rows * tokens.x.cols));
  const zm::MatrixView view{x.data(), zm::DType::kFloat32, tokens.x.rows, tokens.x.cols,
                            tokens.x.cols};
  zm::cast(tokens.x, view);
  zm::run_block(weights, tokens.input, view);
  return x;
}

#ifdef WITH_CUDA
void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, bytes ? bytes : 1));
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }
  zm::Workspace workspace() const { return {data_, bytes_}; }
  void fill(const void* source) const {
    check(cudaMemcpy(data_, source, bytes_, cudaMemcpyHostToDevice));
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// A matrix in BF16 on the device.
struct DeviceMatrix {
  std::int64_t rows, cols;
  DeviceMemory memory;

  explicit DeviceMatrix(const zm::ConstMatrixView& source)
      : rows(source.rows), cols(source.cols), memory(static_cast<std::size_t>(rows * cols * 2)) {
    std::vector<std::uint16_t> narrow(static_cast<std::size_t>(rows * cols));
    zm::cast(source, {narrow.data(), zm::DType::kBFloat16, rows, cols, cols});
    memory.fill(narrow.data());
  }
  zm::MatrixView view() const { return {memory.data(), zm::DType::kBFloat16, rows, cols, cols}; }
};

std::vector<float> run_on_gpu(const zm::BlockWeights& weights, const Tokens& tokens,
                              zm::BlockCompute compute) {
  const DeviceMemory memory(zm::DeviceBlock::memory_size(weights, compute));
  const zm::DeviceBlock block(weights, compute, memory.workspace());
  const DeviceMatrix x(tokens.x);
  const DeviceMemory rotations(tokens.rotations.size() * sizeof(float));
  rotations.fill(tokens.rotations.data());
  zm::BlockInput input = tokens.input;
  input.rotations.data = rotations.data();
  std::optional<DeviceMatrix> conditioning;
  if (input.conditioning) {
    conditioning.emplace(*input.conditioning);
    input.conditioning = {conditioning->memory.data(), zm::DType::kBFloat16, conditioning->rows,
                          conditioning->cols, conditioning->cols};
  }
  const DeviceMemory workspace(block.workspace_size(x.rows, 1));
  block.run(input, x.view(), workspace.workspace(), {});

  std::vector<std::uint16_t> narrow(static_cast<std::size_t>(x.rows * x.cols));
  check(cudaMemcpy(narrow.data(), x.memory.data(), narrow.size() * 2, cudaMemcpyDeviceToHost));
  std::vector<float> result(narrow.size());
  zm::cast({narrow.data(), zm::DType::kBFloat16, x.rows, x.cols, x.cols},
           {result.data(), zm::DType::kFloat32, x.rows, x.cols, x.cols});
  return result;
}
#endif

std::vector<float> run(const zm::BlockWeights& weights, const Tokens& tokens,
                       const std::string& compute) {
  if (compute == "cpu") return run_on_cpu(weights, tokens);
#ifdef WITH_CUDA
  if (compute == "weight-only") {
    return run_on_gpu(weights, tokens, zm::BlockCompute::kWeightOnly);
  }
  if (compute == "fp8") return run_on_gpu(weights, tokens, zm::BlockCompute::kFP8);
  if (compute == "mxfp8") return run_on_gpu(weights, tokens, zm::BlockCompute::kMXFP8);
  throw std::invalid_argument("there is no \"" + compute + "\"");
#else
  throw std::invalid_argument("there is no \"" + compute + "\" in a build without CUDA");
#endif
}

void run(const std::vector<std::string>& words) {
  if (words.size() < 4 || words.size() > 5) throw std::invalid_argument("give four words or five");
  const zm::Checkpoint checkpoint(words[0]), input(words[2]);
  const zm::BlockWeights weights = zm::find_block(checkpoint, checkpoint.layers(), words[1]);
  const Tokens tokens(input);
  const std::vector<float> x = run(weights, tokens, words.size() == 5 ? words[4] : "cpu");
  zm::CheckpointPlan plan;
  plan.add_tensor("x", {"F32", {tokens.x.rows, tokens.x.cols}});
  zm::CheckpointWriter writer(words[3], plan, true);
  writer.write("x", x.data(), x.size() * sizeof(float));
  writer.finish();
}

}  // namespace

int main(int count, char** words) {
  try {
    run({words + 1, words + count});
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr,
                 "block: %s\nusage: block CHECKPOINT BLOCK INPUT OUTPUT "
                 "[cpu|weight-only|fp8|mxfp8]\n",
                 error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "block: %s\n", error.what());
    return 1;
  }
}
