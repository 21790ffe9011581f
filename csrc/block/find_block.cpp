#include "block/shapes.h"
#include "zimage_mxfp8/block.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8 {
namespace {

class Finder {
 public:
  Finder(const Checkpoint& checkpoint, const MXFP8Layers& layers, const std::string& name)
      : checkpoint_(checkpoint), layers_(layers), name_(name) {}

  BlockWeights find() const {
    const ConstMatrixView norm = vector("attention_norm1.weight");
    const std::int64_t width = norm.cols;
    if (width < 1 || width % kHeadSize != 0) {
      fail("attention_norm1.weight", "has " + std::to_string(width) +
                                         " elements, which are no heads of " +
                                         std::to_string(kHeadSize));
    }
    const LinearWeights w1 = linear("feed_forward.w1");
    const std::int64_t hidden = detail::rows_of(w1);
    std::optional<ModulationWeights> modulation;
    if (has("adaLN_modulation.0.weight")) {
      modulation = {weights("adaLN_modulation.0"), vector("adaLN_modulation.0.bias", 4 * width)};
    }
    BlockWeights block{width,
                       width / kHeadSize,
                       linear("attention.qkv"),
                       linear("attention.out"),
                       w1,
                       linear("feed_forward.w3"),
                       linear("feed_forward.w2"),
                       modulation,
                       norm,
                       vector("attention_norm2.weight", width),
                       vector("ffn_norm1.weight", width),
                       vector("ffn_norm2.weight", width),
                       vector("attention.q_norm.weight", kHeadSize),
                       vector("attention.k_norm.weight", kHeadSize)};
    check(block.qkv, "attention.qkv", 3 * width, width);
    check(block.out, "attention.out", width, width);
    check(block.w1, "feed_forward.w1", hidden, width);
    check(block.w3, "feed_forward.w3", hidden, width);
    check(block.w2, "feed_forward.w2", width, hidden);
    if (modulation) {
      check(modulation->linear, "adaLN_modulation.0", 4 * width,
            detail::cols_of(modulation->linear));
    }
    return block;
  }

 private:
  [[noreturn]] void fail(const std::string& tensor, const std::string& problem) const {
    throw CheckpointError(checkpoint_.path().u8string() + ": \"" + name_ + "." + tensor + "\" " +
                          problem + "; choose a checkpoint of Z-Image in ComfyUI's layout");
  }

  bool has(const std::string& tensor) const {
    return checkpoint_.tensors().count(name_ + "." + tensor) > 0;
  }

  ConstMatrixView plain(const std::string& tensor) const {
    if (!has(tensor)) fail(tensor, "is missing");
    try {
      return matrix_view(checkpoint_.tensor(name_ + "." + tensor));
    } catch (const InvalidArgument&) {
      fail(tensor, "is not a matrix or a vector of BF16, F16 or F32");
    }
  }

  ConstMatrixView vector(const std::string& tensor, std::int64_t size = -1) const {
    const ConstMatrixView view = plain(tensor);
    if (view.rows != 1 || (size >= 0 && view.cols != size)) {
      fail(tensor,
           "is [" + std::to_string(view.rows) + ", " + std::to_string(view.cols) + "], " +
               (size < 0 ? std::string("not a vector") : "not [" + std::to_string(size) + "]"));
    }
    return view;
  }

  LinearWeights linear(const std::string& layer) const {
    if (has(layer + ".bias")) fail(layer + ".bias", "is not part of a block");
    return weights(layer);
  }

  LinearWeights weights(const std::string& layer) const {
    LinearWeights weights{};
    const auto quantised = layers_.find(name_ + "." + layer);
    if (quantised == layers_.end()) {
      weights.weight = plain(layer + ".weight");
    } else {
      weights.weight = quantised->second.weight;
      weights.full_precision = quantised->second.full_precision;
    }
    return weights;
  }

  void check(const LinearWeights& weights, const std::string& layer, std::int64_t rows,
             std::int64_t cols) const {
    if (detail::rows_of(weights) != rows || detail::cols_of(weights) != cols) {
      fail(layer + ".weight",
           "is " + detail::shape_text(detail::rows_of(weights), detail::cols_of(weights)) +
               ", not " + detail::shape_text(rows, cols));
    }
  }

  const Checkpoint& checkpoint_;
  const MXFP8Layers& layers_;
  const std::string& name_;
};

}  // namespace

BlockWeights find_block(const Checkpoint& checkpoint, const MXFP8Layers& layers,
                        const std::string& name) {
  return Finder(checkpoint, layers, name).find();
}

}  // namespace zimage_mxfp8
