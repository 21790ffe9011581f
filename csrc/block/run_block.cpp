#include <cmath>
#include <utility>

#include "block/shapes.h"
#include "cpu/parallel.h"
#include "gemm/reference/reference.h"
#include "zimage_mxfp8/attention.h"
#include "zimage_mxfp8/block.h"
#include "zimage_mxfp8/cast.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8 {
namespace {

// A matrix of float32 with adjacent rows.
class Matrix {
 public:
  Matrix() = default;
  Matrix(std::int64_t rows, std::int64_t cols)
      : rows_(rows), cols_(cols), values_(static_cast<std::size_t>(rows * cols)) {}
  explicit Matrix(const ConstMatrixView& source) : Matrix(source.rows, source.cols) {
    cast(source, view());
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  float* row(std::int64_t index) { return values_.data() + index * cols_; }
  const float* row(std::int64_t index) const { return values_.data() + index * cols_; }
  MatrixView view() { return {values_.data(), DType::kFloat32, rows_, cols_, cols_}; }
  ConstMatrixView view() const { return {values_.data(), DType::kFloat32, rows_, cols_, cols_}; }

 private:
  std::int64_t rows_ = 0, cols_ = 0;
  std::vector<float> values_;
};

detail::GemmOperandTask operand_of(const ConstMatrixView& view) {
  return {OperandFormat::kBFloat16, view.data, nullptr, view.row_stride, view.dtype};
}

detail::GemmOperandTask operand_of(const ConstMXFP8View& view) {
  return {OperandFormat::kMXFP8, view.codes, view.scales,
          MXFP8Shape{view.rows, view.cols}.code_cols(), DType::kBFloat16};
}

// Writes RMSNorm(from) * weight.
void norm(const float* from, const float* weight, std::int64_t size, float* to) {
  float sum = 0.0f;
  for (std::int64_t i = 0; i < size; ++i) sum += from[i] * from[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + kBlockNormEps);
  for (std::int64_t i = 0; i < size; ++i) to[i] = from[i] * factor * weight[i];
}

class Run {
 public:
  Run(const BlockWeights& block, const BlockInput& input, const MatrixView& x, int threads)
      : block_(block), input_(input), x_(x), threads_(threads) {
    for (std::size_t item = 0; item < input.lengths.size(); ++item) {
      items_.insert(items_.end(), static_cast<std::size_t>(input.lengths[item]),
                    static_cast<std::int64_t>(item));
    }
    if (!block.modulation) return;
    modulation_ = linear(Matrix(*input.conditioning), block.modulation->linear);
    const Matrix bias(block.modulation->bias);
    for (std::int64_t item = 0; item < modulation_.rows(); ++item) {
      for (std::int64_t i = 0; i < bias.cols(); ++i) modulation_.row(item)[i] += bias.row(0)[i];
    }
  }

  void run() {
    add(linear(attention(normed_x(block_.attention_norm1, 0)), block_.out), block_.attention_norm2,
        1);
    add(linear(feed_forward(normed_x(block_.ffn_norm1, 2)), block_.w2), block_.ffn_norm2, 3);
  }

 private:
  float* x_row(std::int64_t row) const {
    return static_cast<float*>(x_.data) + row * x_.row_stride;
  }

  // A quarter of the modulation for a token; null without a modulation.
  const float* modulation(std::int64_t row, int quarter) const {
    if (!block_.modulation) return nullptr;
    return modulation_.row(items_[static_cast<std::size_t>(row)]) + quarter * block_.width;
  }

  template <typename Body>
  void for_rows(std::int64_t cols, Body body) const {
    detail::parallel_for(x_.rows, detail::row_grain(cols), threads_,
                         [&](std::int64_t begin, std::int64_t end) {
                           for (std::int64_t row = begin; row < end; ++row) body(row);
                         });
  }

  Matrix linear(const Matrix& a, const LinearWeights& weights) const {
    Matrix d(a.rows(), detail::rows_of(weights));
    const auto b = std::visit([](const auto& view) { return operand_of(view); }, weights.weight);
    detail::reference_gemm({a.rows(), d.cols(), a.cols(), operand_of(a.view()), b, nullptr,
                            d.row(0), DType::kFloat32, d.cols(), nullptr, nullptr},
                           threads_);
    return d;
  }

  Matrix normed_x(const ConstMatrixView& norm_weight, int quarter) const {
    const Matrix weight(norm_weight);
    Matrix result(x_.rows, block_.width);
    for_rows(block_.width, [&](std::int64_t row) {
      float* to = result.row(row);
      norm(x_row(row), weight.row(0), block_.width, to);
      const float* scale = modulation(row, quarter);
      for (std::int64_t i = 0; scale && i < block_.width; ++i) to[i] *= 1.0f + scale[i];
    });
    return result;
  }

  void add(const Matrix& y, const ConstMatrixView& norm_weight, int quarter) const {
    const Matrix weight(norm_weight);
    for_rows(block_.width, [&](std::int64_t row) {
      std::vector<float> change(static_cast<std::size_t>(block_.width));
      norm(y.row(row), weight.row(0), block_.width, change.data());
      const float* gate = modulation(row, quarter);
      float* x = x_row(row);
      for (std::int64_t i = 0; i < block_.width; ++i) {
        x[i] += change[static_cast<std::size_t>(i)] * (gate ? std::tanh(gate[i]) : 1.0f);
      }
    });
  }

  Matrix attention(const Matrix& h) const {
    Matrix qkv = linear(h, block_.qkv);
    const Matrix weights[2] = {Matrix(block_.q_norm), Matrix(block_.k_norm)};
    for_rows(block_.width, [&](std::int64_t row) {
      const auto* rotations =
          static_cast<const float*>(input_.rotations.data) + row * input_.rotations.row_stride;
      for (std::int64_t head = 0; head < 2 * block_.heads; ++head) {
        float* values = qkv.row(row) + head * kHeadSize;
        norm(values, weights[head / block_.heads].row(0), kHeadSize, values);
        for (std::int64_t i = 0; i < kHeadSize; i += 2) {
          const float real = values[i], imaginary = values[i + 1];
          const float cosine = rotations[i], sine = rotations[i + 1];
          values[i] = real * cosine - imaginary * sine;
          values[i + 1] = real * sine + imaginary * cosine;
        }
      }
    });
    Matrix attended(x_.rows, block_.width);
    attend(std::as_const(qkv).view(), block_.heads, input_.lengths, attended.view(), threads_);
    return attended;
  }

  Matrix feed_forward(const Matrix& h) const {
    Matrix gate = linear(h, block_.w1);
    const Matrix up = linear(h, block_.w3);
    for_rows(gate.cols(), [&](std::int64_t row) {
      for (std::int64_t i = 0; i < gate.cols(); ++i) {
        float& value = gate.row(row)[i];
        value = value / (1.0f + std::exp(-value)) * up.row(row)[i];
      }
    });
    return gate;
  }

  const BlockWeights& block_;
  const BlockInput& input_;
  const MatrixView x_;
  const int threads_;
  std::vector<std::int64_t> items_;  // of each token
  Matrix modulation_;                // [items, 4 D]
};

}  // namespace

void run_block(const BlockWeights& block, const BlockInput& input, const MatrixView& x,
               int threads) {
  detail::check_block(block);
  detail::check_block_input(input, x, block.width,
                            block.modulation ? detail::cols_of(block.modulation->linear) : 0,
                            DType::kFloat32);
  if (x.rows > 0) Run(block, input, x, threads).run();
}

}  // namespace zimage_mxfp8
