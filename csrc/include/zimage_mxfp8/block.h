// One block of Z-Image's transformer (S3-DiT): attention and feed-forward, each between two
// RMSNorms, with a modulation by the timestep or without one.
//
//   scale_attention, gate_attention, scale_ffn, gate_ffn = modulation(conditioning), in quarters
//   h = RMSNorm(x) * attention_norm1 * (1 + scale_attention)
//   x += tanh(gate_attention) * RMSNorm(out(attend(rotate_heads(qkv(h))))) * attention_norm2
//   h = RMSNorm(x) * ffn_norm1 * (1 + scale_ffn)
//   x += tanh(gate_ffn) * RMSNorm(w2(silu(w1(h)) * w3(h))) * ffn_norm2
//
// Without a modulation, scales are 0 and the tanh of the gates is 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "zimage_mxfp8/checkpoint.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/fused.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

inline constexpr float kBlockNormEps = 1e-5f;  // of all RMSNorms

// A linear layer without a bias in host memory, [N, K].
struct LinearWeights {
  std::variant<ConstMatrixView, ConstMXFP8View> weight;
  bool full_precision = false;  // as in MXFP8Layer
};

struct ModulationWeights {
  LinearWeights linear;  // [4 D, C]
  ConstMatrixView bias;  // [1, 4 D]
};

// A block in host memory. D is its width, F that of its feed-forward, C that of the conditioning.
struct BlockWeights {
  std::int64_t width;  // D = heads * 128
  std::int64_t heads;
  LinearWeights qkv, out;    // [3 D, D], [D, D]
  LinearWeights w1, w3, w2;  // [F, D], [F, D], [D, F]
  std::optional<ModulationWeights> modulation;
  ConstMatrixView attention_norm1, attention_norm2, ffn_norm1, ffn_norm2;  // [1, D]
  ConstMatrixView q_norm, k_norm;                                          // [1, 128]
};

// The block of that name, such as "layers.0" or "model.diffusion_model.layers.0", in ComfyUI's
// layout. `layers` are the checkpoint's, and the result points into its memory. Throws
// CheckpointError for a tensor that is missing or has another shape.
BlockWeights find_block(const Checkpoint& checkpoint, const MXFP8Layers& layers,
                        const std::string& name);

// What a block takes besides x [M, D], where M is the number of tokens of all items of a batch,
// which follow one another.
struct BlockInput {
  ConstMatrixView rotations;                    // [M, 128] float32, see compute_rotations()
  std::vector<std::int64_t> lengths;            // tokens of each item
  std::optional<ConstMatrixView> conditioning;  // [items, C]: the embedded timestep; for a block
                                                // with a modulation
  Items items = nullptr;  // on a device the item of each token; null if there is only one
};

// The cosine and sine of the rotary angles of each token. `positions` is [tokens, 3]: the position
// of a caption's token or a frame, the row and the column; `rotations` is [tokens, 64, 2].
void compute_rotations(const std::int32_t* positions, std::int64_t tokens, float* rotations);

// Runs a block in host memory on x [M, D], in place. All activations are float32, and quantised
// weights are decoded exactly. Throws InvalidArgument if shapes or dtypes disagree or a pointer is
// null.
void run_block(const BlockWeights& block, const BlockInput& input, const MatrixView& x,
               int threads = 0);

// How a device multiplies with weights in MXFP8. Plain weights, and weights of layers that need
// full precision, are multiplied with activations in BF16.
enum class BlockCompute : std::uint8_t {
  kWeightOnly,  // activations in BF16
  kFP8,         // weights folded to one scale per row, activations in E4M3 with a scale per token;
                // a layer that cannot be folded (see fold()) is weight-only
  kMXFP8,       // activations in MXFP8
};

// Attention on a device: the arguments of attend().
using DeviceAttention = std::function<void(const ConstMatrixView& qkv, std::int64_t heads,
                                           const std::vector<std::int64_t>& lengths,
                                           const MatrixView& out, CudaStream stream)>;

// A block on a CUDA device, in memory that the caller owns. D, F and C are multiples of 32.
class DeviceBlock {
 public:
  // Bytes of device memory for the weights. Throws Unsupported for sizes that are not multiples
  // of 32.
  static std::size_t memory_size(const BlockWeights& block, BlockCompute compute);

  // Copies weights to `memory` on the current device, which is aligned to 256 bytes and kept until
  // the object is destroyed, and returns when that is done. w1 and w3 share one GEMM if both are
  // stored alike and, in MXFP8, F is a multiple of 128; otherwise they are weight-only. Throws
  // Unsupported without CUDA and as memory_size() does, InvalidArgument for memory that breaks
  // these rules, CudaError.
  DeviceBlock(const BlockWeights& block, BlockCompute compute, Workspace memory,
              CudaStream stream = {});
  ~DeviceBlock();
  DeviceBlock(DeviceBlock&&) noexcept;
  DeviceBlock& operator=(DeviceBlock&&) noexcept;

  // Bytes of workspace that run() needs. Throws Unsupported if no kernel multiplies a layer fast
  // on this device.
  std::size_t workspace_size(std::int64_t tokens, std::int64_t items) const;

  // Runs the block on x [M, D] in BF16, in place, and returns before it is done (see CudaStream in
  // device.h). Conditioning is BF16; rotations and items are in device memory, too. The workspace
  // is aligned to 256 bytes and belongs to the call until its work on the stream is done. Without
  // an `attention`, attend() is used, which is not fast. Throws InvalidArgument if shapes or dtypes
  // disagree, as the operations do.
  void run(const BlockInput& input, const MatrixView& x, Workspace workspace, CudaStream stream,
           const DeviceAttention& attention = {}) const;

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

}  // namespace zimage_mxfp8
