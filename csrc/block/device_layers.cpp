#include "block/device_layers.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "block/region.h"
#include "block/shapes.h"
#include "cuda/runtime.h"
#include "zimage_mxfp8/cast.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/row_scaled.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr std::int64_t kScaleTileRows = 128;

bool is_quantised(const LinearWeights& linear) {
  return std::holds_alternative<ConstMXFP8View>(linear.weight);
}

// Whether layers of the same width can be one GEMM.
bool can_stack(const LinearWeights& one, const LinearWeights& other) {
  if (!is_quantised(one) || !is_quantised(other)) return is_quantised(one) == is_quantised(other);
  return one.full_precision == other.full_precision && rows_of(one) % kScaleTileRows == 0;
}

// Layers to load as one, from top to bottom.
using Parts = std::vector<const LinearWeights*>;

struct Plan {
  Parts parts;
  BlockCompute compute;
};

struct BlockPlans {
  std::vector<Plan> ffn_in;  // w1 and w3
  Plan qkv, out, ffn_out;
  std::vector<Plan> modulation;  // one, or none

  BlockPlans(const BlockWeights& block, BlockCompute compute)
      : qkv{{&block.qkv}, compute}, out{{&block.out}, compute}, ffn_out{{&block.w2}, compute} {
    if (can_stack(block.w1, block.w3)) {
      ffn_in = {{{&block.w1, &block.w3}, compute}};
    } else {  // they share their input
      ffn_in = {{{&block.w1}, BlockCompute::kWeightOnly}, {{&block.w3}, BlockCompute::kWeightOnly}};
    }
    if (block.modulation) modulation = {{{&block.modulation->linear}, BlockCompute::kWeightOnly}};
  }

  std::vector<const Plan*> all() const {
    std::vector<const Plan*> plans{&qkv, &out, &ffn_out};
    for (const Plan& plan : ffn_in) plans.push_back(&plan);
    for (const Plan& plan : modulation) plans.push_back(&plan);
    return plans;
  }
};

LinearSize size_of(const Plan& plan) {
  LinearSize size{0, cols_of(*plan.parts[0])};
  for (const LinearWeights* part : plan.parts) size.n += rows_of(*part);
  return size;
}

OperandFormat stored_format(const Plan& plan) {
  if (!is_quantised(*plan.parts[0])) return OperandFormat::kBFloat16;
  const bool folds = plan.compute == BlockCompute::kFP8 && !plan.parts[0]->full_precision;
  return folds ? OperandFormat::kRowScaled : OperandFormat::kMXFP8;
}

std::int64_t weight_bytes(OperandFormat format, const LinearSize& size) {
  return size.n * size.k * (format == OperandFormat::kBFloat16 ? kBF16Bytes : 1);
}

// Row-scaled weights have room for the scales of MXFP8, which they stay in if they cannot be
// folded.
std::int64_t scale_bytes(OperandFormat format, const LinearSize& size) {
  if (format == OperandFormat::kBFloat16) return 0;
  const std::int64_t of_blocks = MXFP8Shape{size.n, size.k}.scale_bytes();
  if (format == OperandFormat::kMXFP8) return of_blocks;
  return std::max(of_blocks, size.n * std::int64_t{sizeof(float)});
}

std::int64_t memory_of(const Plan& plan) {
  const LinearSize size = size_of(plan);
  if (size.n % kBlockSize != 0 || size.k % kBlockSize != 0) {
    throw Unsupported("a layer of the block is " + shape_text(size.n, size.k) +
                      ": on a device both sizes must be multiples of 32");
  }
  const OperandFormat format = stored_format(plan);
  Region region;
  region.take(weight_bytes(format, size));
  region.take(scale_bytes(format, size));
  return region.used();
}

class Loader {
 public:
  Loader(void* memory, CudaStream stream) : region_(memory), stream_(stream) {}

  DeviceLinear load(const Plan& plan) {
    const LinearSize size = size_of(plan);
    DeviceLinear linear{size, {}, nullptr, OperandFormat::kBFloat16};
    const OperandFormat format = stored_format(plan);
    void* const codes = region_.take(weight_bytes(format, size));
    void* const scales = region_.take(scale_bytes(format, size));
    if (format == OperandFormat::kBFloat16) {
      linear.weight = plain(plan.parts, size, codes);
    } else if (format == OperandFormat::kRowScaled && fold_to(plan.parts, codes, scales)) {
      linear.weight = ConstRowScaledView{static_cast<const std::uint8_t*>(codes),
                                         static_cast<const float*>(scales), size.n, size.k};
      linear.input = OperandFormat::kRowScaled;
    } else {
      copy_mxfp8(plan.parts, codes, scales);
      linear.weight = ConstMXFP8View{static_cast<const std::uint8_t*>(codes),
                                     static_cast<const std::uint8_t*>(scales), size.n, size.k};
      const bool encodes = plan.compute == BlockCompute::kMXFP8 && !plan.parts[0]->full_precision;
      linear.input = encodes ? OperandFormat::kMXFP8 : OperandFormat::kBFloat16;
    }
    return linear;
  }

  // A matrix in BF16.
  const void* vector(const ConstMatrixView& matrix) {
    void* const target = region_.take(matrix.rows * matrix.cols * kBF16Bytes);
    copy_plain(matrix, target);
    return target;
  }

 private:
  void copy(void* target, const void* source, std::int64_t bytes) {
    const auto stream = static_cast<cudaStream_t>(stream_.handle);
    ZM_CUDA_CHECK(cudaMemcpyAsync(target, source, static_cast<std::size_t>(bytes),
                                  cudaMemcpyHostToDevice, stream));
    ZM_CUDA_CHECK(cudaStreamSynchronize(stream));  // the source may be freed
  }

  void copy_plain(const ConstMatrixView& matrix, void* target) {
    std::vector<std::uint16_t> narrow(static_cast<std::size_t>(matrix.rows * matrix.cols));
    cast(matrix, {narrow.data(), DType::kBFloat16, matrix.rows, matrix.cols, matrix.cols});
    copy(target, narrow.data(), matrix.rows * matrix.cols * kBF16Bytes);
  }

  ConstMatrixView plain(const Parts& parts, const LinearSize& size, void* target) {
    std::int64_t at = 0;
    for (const LinearWeights* part : parts) {
      const auto& matrix = std::get<ConstMatrixView>(part->weight);
      copy_plain(matrix, static_cast<char*>(target) + at);
      at += matrix.rows * matrix.cols * kBF16Bytes;
    }
    return {target, DType::kBFloat16, size.n, size.k, size.k};
  }

  // Returns whether the weights can be folded.
  bool fold_to(const Parts& parts, void* codes, void* scales) {
    std::vector<std::uint8_t> folded_codes;
    std::vector<float> folded_scales;
    for (const LinearWeights* part : parts) {
      const auto& matrix = std::get<ConstMXFP8View>(part->weight);
      const std::size_t code_begin = folded_codes.size(), scale_begin = folded_scales.size();
      folded_codes.resize(code_begin + static_cast<std::size_t>(matrix.rows * matrix.cols));
      folded_scales.resize(scale_begin + static_cast<std::size_t>(matrix.rows));
      try {
        fold(matrix, RowScaledView{folded_codes.data() + code_begin,
                                   folded_scales.data() + scale_begin, matrix.rows, matrix.cols});
      } catch (const PrecisionLoss&) {
        return false;
      }
    }
    copy(codes, folded_codes.data(), static_cast<std::int64_t>(folded_codes.size()));
    copy(scales, folded_scales.data(),
         static_cast<std::int64_t>(folded_scales.size() * sizeof(float)));
    return true;
  }

  void copy_mxfp8(const Parts& parts, void* codes, void* scales) {
    std::int64_t code = 0, scale = 0;
    for (const LinearWeights* part : parts) {
      const auto& matrix = std::get<ConstMXFP8View>(part->weight);
      const MXFP8Shape shape{matrix.rows, matrix.cols};
      copy(static_cast<char*>(codes) + code, matrix.codes, shape.code_bytes());
      copy(static_cast<char*>(scales) + scale, matrix.scales, shape.scale_bytes());
      code += shape.code_bytes();
      scale += shape.scale_bytes();
    }
  }

  Region region_;
  CudaStream stream_;
};

}  // namespace

std::int64_t layers_memory(const BlockWeights& block, BlockCompute compute) {
  const BlockPlans plans(block, compute);
  Region region;
  for (const Plan* plan : plans.all()) region.take(memory_of(*plan));
  if (block.modulation) region.take(4 * block.width * kBF16Bytes);  // its bias
  for (int norm = 0; norm < 4; ++norm) region.take(block.width * kBF16Bytes);
  for (int norm = 0; norm < 2; ++norm) region.take(kHeadSize * kBF16Bytes);
  return region.used();
}

DeviceLayers load_layers(const BlockWeights& block, BlockCompute compute, void* memory,
                         CudaStream stream) {
  const BlockPlans plans(block, compute);
  Loader loader(memory, stream);
  DeviceLayers layers{};
  layers.width = block.width;
  layers.heads = block.heads;
  layers.qkv = loader.load(plans.qkv);
  layers.out = loader.load(plans.out);
  layers.ffn_out = loader.load(plans.ffn_out);
  for (const Plan& plan : plans.ffn_in) layers.ffn_in.push_back(loader.load(plan));
  for (const Plan& plan : plans.modulation) {
    layers.modulation.push_back(loader.load(plan));
    layers.modulation.back().bias = loader.vector(block.modulation->bias);
  }
  layers.attention_norm1 = loader.vector(block.attention_norm1);
  layers.attention_norm2 = loader.vector(block.attention_norm2);
  layers.ffn_norm1 = loader.vector(block.ffn_norm1);
  layers.ffn_norm2 = loader.vector(block.ffn_norm2);
  layers.q_norm = loader.vector(block.q_norm);
  layers.k_norm = loader.vector(block.k_norm);
  return layers;
}

}  // namespace zimage_mxfp8::detail
