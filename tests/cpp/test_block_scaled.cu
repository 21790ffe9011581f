// What can be known of the block-scaled kernels without the GPUs that run them: their scale
// layouts, their shared memory, the problems that they accept, and that the operands which they are
// given mean the product that the emulated path computes.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include "gemm/blackwell/block_scaled_kernel.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/scale_layout.h"

namespace zimage_mxfp8::detail {
namespace {

using BF16 = cutlass::bfloat16_t;

struct Shape {
  std::int64_t m, n, k;
};

// [N, K] of Z-Image's linears with 32 tokens, ragged numbers of them, and a whole image; then the
// odd ones that the API promises.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const std::int64_t m : {1, 32, 77, 128, 129, 4224}) {
    for (const auto& [n, k] : {std::pair{11520, 3840},
                               {3840, 3840},
                               {10240, 3840},
                               {3840, 10240},
                               {15360, 256},
                               {3840, 2560}}) {
      all.push_back({m, n, k});
    }
  }
  for (const std::int64_t m : {1, 7, 300}) {
    for (const auto& [n, k] : {std::pair{8, 32}, {40, 96}, {264, 160}, {136, 3872}}) {
      all.push_back({m, n, k});
    }
  }
  return all;
}

GemmTask task_of(const Shape& shape) {
  GemmTask task{};
  task.m = shape.m;
  task.n = shape.n;
  task.k = shape.k;
  task.d_row_stride = shape.n;
  return task;
}

template <class Layout>
bool equals_ours(const Layout& layout, std::int64_t rows, std::int64_t k) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < k; ++column) {
      const auto offset = layout(static_cast<int>(row), static_cast<int>(column), 0);
      if (offset != scale_offset(row, column / 32, ceil_div(k, 128))) return false;
    }
  }
  return true;
}

template <class Layout>
std::int64_t bytes_of(const Layout& layout) {
  return cute::cosize(cute::filter_zeros(layout));
}

template <class Kernel>
float element(const void* pointer, std::int64_t offset) {
  return static_cast<float>(static_cast<const cutlass::float_e4m3_t*>(pointer)[offset]);
}

float scale(const void* pointer, std::int64_t offset) {
  return std::ldexp(1.0f, static_cast<const std::uint8_t*>(pointer)[offset] - 127);
}

// The product as a kernel's arguments describe it, each element found through CuTe's layouts.
template <class Kernel, class Output>
void evaluate(const typename Kernel::Gemm::Arguments& arguments, std::vector<float>& out) {
  const auto [m, n, k, l] = arguments.problem_shape;
  const auto& mainloop = arguments.mainloop;
  const auto& epilogue = arguments.epilogue;
  const auto a = cute::make_layout(cute::make_shape(m, k, l), mainloop.dA);
  const auto b = cute::make_layout(cute::make_shape(n, k, l), mainloop.dB);
  const auto d = cute::make_layout(cute::make_shape(m, n, l), epilogue.dD);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int x = 0; x < k; ++x) {
        sum += element<Kernel>(mainloop.ptr_A, a(i, x, 0)) *
               scale(mainloop.ptr_SFA, mainloop.layout_SFA(i, x, 0)) *
               (element<Kernel>(mainloop.ptr_B, b(j, x, 0)) *
                scale(mainloop.ptr_SFB, mainloop.layout_SFB(j, x, 0)));
      }
      sum *= epilogue.thread.alpha;
      if (epilogue.thread.bias_ptr) sum += static_cast<float>(epilogue.thread.bias_ptr[j]);
      // Where the kernel would write, counted from the pointer that it is given.
      out[static_cast<std::size_t>(d(i, j, 0))] = static_cast<float>(Output(sum));
    }
  }
}

template <class Config_, class Output_>
struct Case {
  using Config = Config_;
  using Output = Output_;
  using Kernel = BlockScaledKernel<Config, Output>;
};

#define ZM_CASES                                                           \
  Case<SM100Large, BF16>, Case<SM100Medium, BF16>, Case<SM100Small, BF16>, \
      Case<SM100Small, float>, Case<SM120, BF16>, Case<SM120, float>

TEST_CASE_TEMPLATE("shared memory fits the family", T, ZM_CASES) {
  const auto bytes = sizeof(typename T::Kernel::Kernel::SharedStorage);
  CHECK(bytes <= T::Config::max_shared_memory);
  CHECK(bytes > T::Config::max_shared_memory / 2);  // stages are what the rest is for
}

TEST_CASE_TEMPLATE("every shape can be implemented", T, ZM_CASES) {
  for (const Shape& shape : shapes()) {
    CAPTURE(shape.m);
    CAPTURE(shape.n);
    CAPTURE(shape.k);
    const auto arguments = T::Kernel::arguments(task_of(shape));
    CHECK(T::Kernel::Gemm::can_implement(arguments) == cutlass::Status::kSuccess);
  }
  // Able to fail: rows that TMA cannot address.
  CHECK(T::Kernel::Gemm::can_implement(T::Kernel::arguments(task_of({32, 12, 40}))) !=
        cutlass::Status::kSuccess);
}

TEST_CASE_TEMPLATE("the workspace is small", T, ZM_CASES) {
  for (const Shape& shape : shapes()) {
    auto arguments = T::Kernel::arguments(task_of(shape));
    arguments.hw_info.sm_count = 148;  // else CUTLASS asks a device
    CHECK(T::Kernel::Gemm::get_workspace_size(arguments) <= 1 << 20);
  }
}

TEST_CASE_TEMPLATE("our scale layout is CuTe's", T, Case<SM100Large, BF16>, Case<SM120, BF16>) {
  for (const Shape& shape : shapes()) {
    const auto arguments = T::Kernel::arguments(task_of(shape));
    CHECK(equals_ours(arguments.mainloop.layout_SFA, shape.m, shape.k));
    CHECK(equals_ours(arguments.mainloop.layout_SFB, shape.n, shape.k));
    CHECK(bytes_of(arguments.mainloop.layout_SFA) == MXFP8Shape{shape.m, shape.k}.scale_bytes());
  }
  const auto arguments = T::Kernel::arguments(task_of({256, 256, 256}));
  CHECK_FALSE(equals_ours(arguments.mainloop.layout_SFA, 256, 128));  // of another width
}

struct Encoded {
  std::vector<std::uint8_t> codes, scales;
  std::int64_t rows, cols;

  Encoded(std::int64_t rows_, std::int64_t cols_, unsigned seed) : rows(rows_), cols(cols_) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> exponent(-6, 6);
    std::vector<float> matrix(static_cast<std::size_t>(rows * cols));
    for (float& value : matrix) value = std::ldexp(normal(random), exponent(random));
    const MXFP8Shape shape{rows, cols};
    codes.resize(static_cast<std::size_t>(shape.code_bytes()));
    scales.resize(static_cast<std::size_t>(shape.scale_bytes()));
    quantize(ConstMatrixView{matrix.data(), DType::kFloat32, rows, cols, cols},
             MXFP8View{codes.data(), scales.data(), rows, cols});
  }
  ConstMXFP8View view() const { return {codes.data(), scales.data(), rows, cols}; }
  GemmOperandTask task() const {
    return {OperandFormat::kMXFP8, codes.data(), scales.data(), cols, DType::kBFloat16};
  }
};

TEST_CASE_TEMPLATE("operands mean the emulated product", T, ZM_CASES) {
  using Output = typename T::Output;
  for (const auto& [m, n, k] : {Shape{33, 40, 96}, {129, 136, 160}, {5, 8, 288}}) {
    const Encoded a(m, k, 1), b(n, k, 2);
    std::vector<BF16> bias(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = BF16(static_cast<float>(i) - 9.0f);
    const std::int64_t stride = n + 8;  // rows of D with a gap
    std::vector<float> want(static_cast<std::size_t>(m * stride), -1.0f), result = want;
    gemm(GemmArguments{a.view(), b.view(), bias.data(),
                       MatrixView{want.data(), DType::kFloat32, m, n, stride}});
    for (float& value : want) value = static_cast<float>(Output(value));

    GemmTask task = task_of({m, n, k});
    task.a = a.task();
    task.b = b.task();
    task.bias = bias.data();
    task.d_dtype = DType::kFloat32;
    task.d_row_stride = stride;
    evaluate<typename T::Kernel, Output>(T::Kernel::arguments(task), result);
    CHECK(result == want);
    task.bias = nullptr;  // able to fail
    evaluate<typename T::Kernel, Output>(T::Kernel::arguments(task), result);
    CHECK(result != want);
  }
}

}  // namespace
}  // namespace zimage_mxfp8::detail
