// Encodes two matrices in MXFP8, multiplies them and compares with the product of the originals:
// on the CPU and, where the library has CUDA and the machine a GPU, on the GPU.
//
//   cmake -B build -Dzimage_mxfp8_DIR="$(zimage-mxfp8 --cmake-dir)" && cmake --build build
//   build/embed
#include <zimage_mxfp8/device.h>
#include <zimage_mxfp8/error.h>
#include <zimage_mxfp8/gemm.h>
#include <zimage_mxfp8/quantize.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>

#include <stdexcept>
#endif

namespace zm = zimage_mxfp8;

namespace {

constexpr std::int64_t kRows = 96, kColumns = 64, kDepth = 256;

using Matrix = std::vector<float>;

Matrix random_matrix(std::int64_t rows, std::int64_t cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Matrix matrix(static_cast<std::size_t>(rows * cols));
  for (float& value : matrix) value = normal(random);
  return matrix;
}

// |result - A B^T| / |A B^T|
double relative_error(const Matrix& a, const Matrix& b, const Matrix& result) {
  double error = 0, norm = 0;
  for (std::int64_t i = 0; i < kRows; ++i) {
    for (std::int64_t j = 0; j < kColumns; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < kDepth; ++k) sum += a[i * kDepth + k] * b[j * kDepth + k];
      const double difference = result[i * kColumns + j] - sum;
      error += difference * difference;
      norm += sum * sum;
    }
  }
  return std::sqrt(error / norm);
}

zm::ConstMatrixView view(const float* data, std::int64_t rows, std::int64_t cols) {
  return {data, zm::DType::kFloat32, rows, cols, cols};
}

Matrix multiply_on_cpu(const Matrix& a, const Matrix& b) {
  const auto encode = [](const Matrix& matrix, std::int64_t rows, std::vector<std::uint8_t>& codes,
                         std::vector<std::uint8_t>& scales) {
    const zm::MXFP8Shape shape{rows, kDepth};
    codes.resize(shape.code_bytes());
    scales.resize(shape.scale_bytes());
    const zm::MXFP8View target{codes.data(), scales.data(), rows, kDepth};
    zm::quantize(view(matrix.data(), rows, kDepth), target);
    return zm::ConstMXFP8View{codes.data(), scales.data(), rows, kDepth};
  };
  std::vector<std::uint8_t> a_codes, a_scales, b_codes, b_scales;
  Matrix d(kRows * kColumns);
  zm::gemm({encode(a, kRows, a_codes, a_scales), encode(b, kColumns, b_codes, b_scales), nullptr,
            zm::MatrixView{d.data(), zm::DType::kFloat32, kRows, kColumns, kColumns}});

  Matrix decoded(a.size());
  zm::dequantize({a_codes.data(), a_scales.data(), kRows, kDepth},
                 {decoded.data(), zm::DType::kFloat32, kRows, kDepth, kDepth});
  std::printf("a[0] = %.6f, decoded %.6f\n", a[0], decoded[0]);
  return d;
}

#ifdef WITH_CUDA
void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { check(cudaMalloc(&data_, bytes ? bytes : 1)); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  template <typename T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

Matrix multiply_on_gpu(const Matrix& a, const Matrix& b, const zm::GemmKernel& kernel) {
  const zm::CudaStream stream;  // the default stream of the current device
  const zm::MXFP8Shape a_shape{kRows, kDepth}, b_shape{kColumns, kDepth};
  const DeviceMemory source(a.size() * sizeof(float)), d(kRows * kColumns * sizeof(float));
  const DeviceMemory a_codes(a_shape.code_bytes()), a_scales(a_shape.scale_bytes());
  const DeviceMemory b_codes(b_shape.code_bytes()), b_scales(b_shape.scale_bytes());
  const auto encode = [&](const Matrix& matrix, std::int64_t rows, const DeviceMemory& codes,
                          const DeviceMemory& scales) {
    check(cudaMemcpy(source.get(), matrix.data(), matrix.size() * sizeof(float),
                     cudaMemcpyHostToDevice));
    zm::quantize(view(source.get<float>(), rows, kDepth),
                 {codes.get<std::uint8_t>(), scales.get<std::uint8_t>(), rows, kDepth}, stream);
    return zm::ConstMXFP8View{codes.get<std::uint8_t>(), scales.get<std::uint8_t>(), rows, kDepth};
  };
  const zm::GemmArguments arguments{
      encode(a, kRows, a_codes, a_scales), encode(b, kColumns, b_codes, b_scales), nullptr,
      zm::MatrixView{d.get(), zm::DType::kFloat32, kRows, kColumns, kColumns}};
  const std::size_t bytes = zm::workspace_size(kernel, zm::problem_of(arguments), 0);
  const DeviceMemory workspace(bytes);
  zm::gemm(kernel, arguments, {workspace.get(), bytes}, stream);
  Matrix result(kRows * kColumns);
  check(cudaMemcpy(result.data(), d.get(), result.size() * sizeof(float), cudaMemcpyDeviceToHost));
  return result;
}
#endif

}  // namespace

int main() {
  const Matrix a = random_matrix(kRows, kDepth, 1), b = random_matrix(kColumns, kDepth, 2);
  double worst = 0;
  const auto report = [&](const char* where, const Matrix& result) {
    const double error = relative_error(a, b, result);
    worst = std::fmax(worst, error);
    std::printf("%-12s relative error of the GEMM %.4f\n", where, error);
  };
  try {
    std::printf("zimage_mxfp8 %s\n", zm::build_info().version.c_str());
    report("cpu", multiply_on_cpu(a, b));
#ifdef WITH_CUDA
    const auto devices = zm::cuda_devices();
    if (devices.empty()) std::printf("no CUDA device\n");
    for (const zm::GemmKernel* kernel : zm::gemm_kernels()) {
      if (devices.empty()) break;
      const zm::GemmProblem problem{kRows,
                                    kColumns,
                                    kDepth,
                                    zm::OperandFormat::kMXFP8,
                                    zm::OperandFormat::kMXFP8,
                                    zm::DType::kFloat32,
                                    false};
      const zm::Support support = zm::supports(*kernel, problem, 0);
      if (support) {
        report(zm::name(*kernel), multiply_on_gpu(a, b, *kernel));
      } else {
        std::printf("%-12s %s\n", zm::name(*kernel), support.reason.c_str());
      }
    }
#endif
  } catch (const std::exception& error) {
    std::fprintf(stderr, "embed: %s\n", error.what());
    return 1;
  }
  return worst < 0.06 ? 0 : 1;  // each operand is off by about 0.026
}
