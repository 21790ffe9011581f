#include "zimage_mxfp8/attention.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "attention/attention_cuda.h"
#include "check.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"
#include "gemm/reference/reference.h"
#include "zimage_mxfp8/fused.h"
#include "zimage_mxfp8/gemm.h"

namespace zimage_mxfp8 {
namespace {

constexpr std::int64_t kQueries = 64;  // that are computed together

struct AttentionMemory {
  detail::MemoryRange qkv, out;
};

AttentionMemory check(const ConstMatrixView& qkv, std::int64_t heads,
                      const std::vector<std::int64_t>& lengths, const MatrixView& out,
                      DType dtype) {
  detail::check_matrix(qkv, "qkv");
  detail::check_matrix(out, "out");
  if (qkv.dtype != dtype || out.dtype != dtype) {
    throw InvalidArgument(
        std::string("qkv and out must be ") +
        (dtype == DType::kFloat32 ? "float32 in host memory" : "bfloat16 on a CUDA device"));
  }
  if (heads < 1 || heads > (std::int64_t{1} << 20) || qkv.cols != 3 * heads * kHeadSize) {
    throw InvalidArgument("qkv has " + std::to_string(qkv.cols) + " columns, which is not 3 * " +
                          std::to_string(heads) + " heads of " + std::to_string(kHeadSize));
  }
  if (out.rows != qkv.rows || out.cols != heads * kHeadSize) {
    throw InvalidArgument("out is " + detail::shape_text(out.rows, out.cols) +
                          ", and the result is " + detail::shape_text(qkv.rows, heads * kHeadSize));
  }
  detail::check_lengths(lengths, qkv.rows, "qkv");
  const AttentionMemory memory{detail::range_of(qkv, "qkv"), detail::range_of(out, "out")};
  detail::check_disjoint(memory.out, {memory.qkv});
  return memory;
}

// One head of one item.
struct Sequence {
  const float *q, *k, *v;
  float* out;
  std::int64_t length, stride, out_stride;
};

detail::GemmOperandTask operand(const float* data, std::int64_t stride) {
  return {OperandFormat::kBFloat16, data, nullptr, stride, DType::kFloat32};
}

// d [m, n] = a [m, k] b [n, k]^T on this thread.
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const detail::GemmOperandTask& a,
              const detail::GemmOperandTask& b, float* d, std::int64_t d_stride) {
  detail::reference_gemm({m, n, k, a, b, nullptr, d, DType::kFloat32, d_stride, nullptr, nullptr},
                         1);
}

void softmax(float* row, std::int64_t length) {
  const float factor = 1.0f / std::sqrt(static_cast<float>(kHeadSize));
  const float largest = *std::max_element(row, row + length);
  float sum = 0.0f;
  for (std::int64_t i = 0; i < length; ++i) {
    row[i] = std::exp((row[i] - largest) * factor);
    sum += row[i];
  }
  for (std::int64_t i = 0; i < length; ++i) row[i] /= sum;
}

void attend_sequence(const Sequence& one) {
  std::vector<float> transposed(static_cast<std::size_t>(kHeadSize * one.length));
  for (std::int64_t token = 0; token < one.length; ++token) {
    for (std::int64_t i = 0; i < kHeadSize; ++i) {
      transposed[static_cast<std::size_t>(i * one.length + token)] = one.v[token * one.stride + i];
    }
  }
  std::vector<float> scores(static_cast<std::size_t>(std::min(kQueries, one.length) * one.length));
  for (std::int64_t begin = 0; begin < one.length; begin += kQueries) {
    const std::int64_t queries = std::min(kQueries, one.length - begin);
    multiply(queries, one.length, kHeadSize, operand(one.q + begin * one.stride, one.stride),
             operand(one.k, one.stride), scores.data(), one.length);
    for (std::int64_t i = 0; i < queries; ++i) {
      softmax(scores.data() + i * one.length, one.length);
    }
    multiply(queries, kHeadSize, one.length, operand(scores.data(), one.length),
             operand(transposed.data(), one.length), one.out + begin * one.out_stride,
             one.out_stride);
  }
}

}  // namespace

void attend(const ConstMatrixView& qkv, std::int64_t heads,
            const std::vector<std::int64_t>& lengths, const MatrixView& out, int threads) {
  const AttentionMemory memory = check(qkv, heads, lengths, out, DType::kFloat32);
  detail::check_alignment(memory.qkv, sizeof(float));
  detail::check_alignment(memory.out, sizeof(float));
  std::vector<Sequence> sequences;
  const auto* row = static_cast<const float*>(qkv.data);
  auto* out_row = static_cast<float*>(out.data);
  for (const std::int64_t length : lengths) {
    for (std::int64_t head = 0; head < heads && length > 0; ++head) {
      const float* q = row + head * kHeadSize;
      const std::int64_t part = heads * kHeadSize;
      sequences.push_back({q, q + part, q + 2 * part, out_row + head * kHeadSize, length,
                           qkv.row_stride, out.row_stride});
    }
    row += length * qkv.row_stride;
    out_row += length * out.row_stride;
  }
  detail::parallel_for(static_cast<std::int64_t>(sequences.size()), 1, threads,
                       [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t i = begin; i < end; ++i) {
                           attend_sequence(sequences[static_cast<std::size_t>(i)]);
                         }
                       });
}

void attend(const ConstMatrixView& qkv, std::int64_t heads,
            const std::vector<std::int64_t>& lengths, const MatrixView& out, CudaStream stream) {
  const AttentionMemory memory = check(qkv, heads, lengths, out, DType::kBFloat16);
  detail::check_rows(memory.qkv, qkv.row_stride, 2);
  detail::check_rows(memory.out, out.row_stride, 2);
  detail::check_device_memory({memory.qkv, memory.out});
  detail::attend_cuda(qkv, heads, lengths, out, stream);
}

}  // namespace zimage_mxfp8
