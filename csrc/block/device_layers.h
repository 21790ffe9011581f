// The layers of a block in device memory.
#pragma once

#include <cstdint>
#include <vector>

#include "zimage_mxfp8/block.h"

namespace zimage_mxfp8::detail {

inline constexpr std::int64_t kBF16Bytes = 2;

struct LinearSize {
  std::int64_t n, k;
};

struct DeviceLinear {
  LinearSize size;
  GemmOperand weight;
  const void* bias;     // BF16, or null
  OperandFormat input;  // of its activations
};

struct DeviceLayers {
  std::int64_t width, heads;
  std::vector<DeviceLinear> ffn_in;      // w1 and w3: one GEMM, or two with the same input
  std::vector<DeviceLinear> modulation;  // one, or none
  DeviceLinear qkv, out, ffn_out;
  const void *attention_norm1, *attention_norm2, *ffn_norm1, *ffn_norm2;  // BF16
  const void *q_norm, *k_norm;

  std::int64_t conditioning_cols() const { return modulation.empty() ? 0 : modulation[0].size.k; }
  std::int64_t hidden() const { return ffn_out.size.k; }
};

// See DeviceBlock::memory_size().
std::int64_t layers_memory(const BlockWeights& block, BlockCompute compute);

// Copies the layers to memory of that size, and returns when this is done.
DeviceLayers load_layers(const BlockWeights& block, BlockCompute compute, void* memory,
                         CudaStream stream);

}  // namespace zimage_mxfp8::detail
