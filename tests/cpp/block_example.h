// A block with random weights in host memory, and what it computes, in binary64 and without code of
// the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "reference.h"
#include "zimage_mxfp8/block.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/scale_layout.h"

namespace block_example {

namespace zm = zimage_mxfp8;

using Values = std::vector<double>;

inline std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

inline float to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A matrix of float32 that BF16 holds exactly.
struct Plain {
  std::int64_t rows, cols;
  std::vector<float> values;

  Plain(std::mt19937& random, std::int64_t rows_, std::int64_t cols_, float mean, float deviation)
      : rows(rows_), cols(cols_) {
    std::normal_distribution<float> normal(mean, deviation);
    for (std::int64_t i = 0; i < rows * cols; ++i) values.push_back(to_bf16(normal(random)));
  }
  zm::ConstMatrixView view() const {
    return {values.data(), zm::DType::kFloat32, rows, cols, cols};
  }
  Values decoded() const { return {values.begin(), values.end()}; }
};

// The same in MXFP8.
struct Encoded {
  zm::MXFP8Shape shape;
  std::vector<std::uint8_t> codes, scales;

  explicit Encoded(const Plain& plain)
      : shape{plain.rows, plain.cols},
        codes(at(shape.code_bytes())),
        scales(at(shape.scale_bytes())) {
    zm::quantize(plain.view(), {codes.data(), scales.data(), plain.rows, plain.cols});
  }
  zm::ConstMXFP8View view() const { return {codes.data(), scales.data(), shape.rows, shape.cols}; }
  Values decoded() const {
    Values values;
    for (std::int64_t row = 0; row < shape.rows; ++row) {
      for (std::int64_t col = 0; col < shape.cols; ++col) {
        const std::int64_t scale = zm::scale_offset(row, col / 32, shape.scale_cols() / 4);
        values.push_back(std::ldexp(reference::e4m3(codes[at(row * shape.code_cols() + col)]),
                                    scales[at(scale)] - 127));
      }
    }
    return values;
  }
};

struct Linear {
  Plain plain;
  std::optional<Encoded> encoded;

  Linear(std::mt19937& random, std::int64_t n, std::int64_t k, bool quantised)
      : plain(random, n, k, 0, 1 / std::sqrt(static_cast<float>(k))) {
    if (quantised) encoded.emplace(plain);
  }
  zm::LinearWeights view() const {
    if (encoded) return {encoded->view()};
    return {plain.view()};
  }
  Values decoded() const { return encoded ? encoded->decoded() : plain.decoded(); }
};

struct Sizes {
  std::int64_t heads, hidden, conditioning;  // no modulation if the last is 0
  std::vector<std::int64_t> lengths;
  bool quantised_w3 = true;
};

class Example {
 public:
  explicit Example(const Sizes& sizes, unsigned seed = 1)
      : sizes_(sizes),
        width_(sizes.heads * 128),
        random_(seed),
        qkv_(random_, 3 * width_, width_, true),
        out_(random_, width_, width_, true),
        w1_(random_, sizes.hidden, width_, true),
        w3_(random_, sizes.hidden, width_, sizes.quantised_w3),
        w2_(random_, width_, sizes.hidden, true),
        modulation_(random_, 4 * width_, sizes.conditioning, sizes.conditioning > 0),
        modulation_bias_(random_, 1, 4 * width_, 0, 0.3f) {
    for (int i = 0; i < 4; ++i) norms_.emplace_back(random_, 1, width_, 1, 0.2f);
    for (int i = 0; i < 2; ++i) norms_.emplace_back(random_, 1, 128, 1, 0.2f);
    for (const std::int64_t length : sizes.lengths) tokens_ += length;
    x_.emplace(random_, tokens_, width_, 0, 1);
    conditioning_.emplace(random_, items(), sizes.conditioning, 0, 1);
    rotations_.resize(at(tokens_ * 128));
    std::vector<std::int32_t> positions;
    for (std::int64_t i = 0; i < 3 * tokens_; ++i) {
      positions.push_back(static_cast<std::int32_t>(i % 7));
    }
    zm::compute_rotations(positions.data(), tokens_, rotations_.data());
  }

  std::int64_t width() const { return width_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t items() const { return static_cast<std::int64_t>(sizes_.lengths.size()); }
  const Plain& x() const { return *x_; }
  const Plain& conditioning() const { return *conditioning_; }
  const std::vector<float>& rotations() const { return rotations_; }

  zm::BlockWeights weights() const {
    zm::BlockWeights block{width_,           sizes_.heads,     qkv_.view(),      out_.view(),
                           w1_.view(),       w3_.view(),       w2_.view(),       std::nullopt,
                           norms_[0].view(), norms_[1].view(), norms_[2].view(), norms_[3].view(),
                           norms_[4].view(), norms_[5].view()};
    if (sizes_.conditioning > 0) {
      block.modulation = zm::ModulationWeights{modulation_.view(), modulation_bias_.view()};
    }
    return block;
  }

  zm::BlockInput input() const {
    zm::BlockInput input{{rotations_.data(), zm::DType::kFloat32, tokens_, 128, 128},
                         sizes_.lengths,
                         std::nullopt,
                         nullptr};
    if (sizes_.conditioning > 0) input.conditioning = conditioning_->view();
    return input;
  }

  // What the block makes of x.
  Values expected() const {
    Values x = x_->decoded(), modulation(at(items() * 4 * width_), 0.0);
    if (sizes_.conditioning > 0) {
      modulation = multiply(conditioning_->decoded(), modulation_.decoded(), items(), 4 * width_,
                            sizes_.conditioning);
      for (std::size_t i = 0; i < modulation.size(); ++i) {
        modulation[i] += modulation_bias_.values[i % at(4 * width_)];
      }
    }
    const auto modulated_norm = [&](const Plain& norm, int quarter) {
      Values h = rms_norm(x, norm, width_);
      for (std::int64_t i = 0; i < tokens_ * width_; ++i) {
        h[at(i)] *= 1 + modulation[place(i, quarter)];
      }
      return h;
    };
    const auto add = [&](const Values& y, const Plain& norm, int quarter) {
      const Values change = rms_norm(y, norm, width_);
      for (std::int64_t i = 0; i < tokens_ * width_; ++i) {
        const double gate =
            sizes_.conditioning > 0 ? std::tanh(modulation[place(i, quarter)]) : 1.0;
        x[at(i)] += gate * change[at(i)];
      }
    };
    Values h = modulated_norm(norms_[0], 0);
    Values qkv = multiply(h, qkv_.decoded(), tokens_, 3 * width_, width_);
    add(multiply(attention(qkv), out_.decoded(), tokens_, width_, width_), norms_[1], 1);
    h = modulated_norm(norms_[2], 2);
    Values gate = multiply(h, w1_.decoded(), tokens_, sizes_.hidden, width_);
    const Values up = multiply(h, w3_.decoded(), tokens_, sizes_.hidden, width_);
    for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
    add(multiply(gate, w2_.decoded(), tokens_, width_, sizes_.hidden), norms_[3], 3);
    return x;
  }

 private:
  // Of an element of x in the modulation.
  std::size_t place(std::int64_t element, int quarter) const {
    std::int64_t token = element / width_, item = 0;
    while (token >= sizes_.lengths[at(item)]) token -= sizes_.lengths[at(item++)];
    return at((item * 4 + quarter) * width_ + element % width_);
  }

  static Values multiply(const Values& a, const Values& b, std::int64_t m, std::int64_t n,
                         std::int64_t k) {
    Values d(at(m * n));
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t x = 0; x < k; ++x)
          d[at(i * n + j)] += a[at(i * k + x)] * b[at(j * k + x)];
      }
    }
    return d;
  }

  static Values rms_norm(const Values& x, const Plain& norm, std::int64_t size) {
    Values result(x.size());
    for (std::size_t begin = 0; begin < x.size(); begin += at(size)) {
      double sum = 0;
      for (std::size_t i = begin; i < begin + at(size); ++i) sum += x[i] * x[i];
      const double root = std::sqrt(sum / static_cast<double>(size) + 1e-5);
      for (std::size_t i = begin; i < begin + at(size); ++i) {
        result[i] = x[i] / root * norm.values[(i - begin)];
      }
    }
    return result;
  }

  Values attention(const Values& qkv) const {
    Values result(at(tokens_ * width_));
    const auto head_of = [&](std::int64_t token, int part, std::int64_t head) {
      const std::int64_t begin = token * 3 * width_ + part * width_ + head * 128;
      Values values(qkv.begin() + begin, qkv.begin() + begin + 128);
      if (part == 2) return values;
      values = rms_norm(values, norms_[part == 0 ? 4 : 5], 128);
      for (std::size_t i = 0; i < 128; i += 2) {
        const double a = values[i], b = values[i + 1];
        const double cosine = rotations_[at(token * 128) + i];
        const double sine = rotations_[at(token * 128) + i + 1];
        values[i] = a * cosine - b * sine;
        values[i + 1] = a * sine + b * cosine;
      }
      return values;
    };
    std::int64_t begin = 0;
    for (const std::int64_t length : sizes_.lengths) {
      for (std::int64_t head = 0; head < sizes_.heads; ++head) {
        for (std::int64_t query = begin; query < begin + length; ++query) {
          const Values q = head_of(query, 0, head);
          Values sum(128, 0.0);
          double total = 0;
          for (std::int64_t key = begin; key < begin + length; ++key) {
            const Values k = head_of(key, 1, head), v = head_of(key, 2, head);
            double score = 0;
            for (std::size_t i = 0; i < 128; ++i) score += q[i] * k[i];
            const double weight = std::exp(score / std::sqrt(128.0));
            total += weight;
            for (std::size_t i = 0; i < 128; ++i) sum[i] += weight * v[i];
          }
          for (std::size_t i = 0; i < 128; ++i) {
            result[at(query * width_ + head * 128) + i] = sum[i] / total;
          }
        }
      }
      begin += length;
    }
    return result;
  }

  Sizes sizes_;
  std::int64_t width_, tokens_ = 0;
  std::mt19937 random_;
  Linear qkv_, out_, w1_, w3_, w2_, modulation_;
  Plain modulation_bias_;
  std::vector<Plain> norms_;  // attention_norm1, attention_norm2, ffn_norm1, ffn_norm2, q, k
  std::optional<Plain> x_, conditioning_;
  std::vector<float> rotations_;
};

// |found - expected| / |expected|
template <typename Found>
double relative_error(const Found& found, const Values& expected) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace block_example
