// Checkpoints: safetensors files, and the MXFP8 layers in them as ComfyUI and this project's
// programs write them.
//
// The functions here throw CheckpointError for files that cannot be read or written, or that break
// a rule of their format. The sentence names the file and, if one is concerned, the tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8 {

// A tensor of a file to write.
struct TensorType {
  std::string dtype;                // as safetensors spells it, such as "BF16" or "F8_E4M3"
  std::vector<std::int64_t> shape;  // row-major
};

// A tensor of an open checkpoint.
struct CheckpointTensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  const void* data;  // with any alignment
  std::int64_t bytes;
};

// A matrix, or a vector as a matrix of one row, of BF16, F16 or F32. Throws InvalidArgument for
// other tensors.
ConstMatrixView matrix_view(const CheckpointTensor& tensor);

// A linear layer in MXFP8.
struct MXFP8Layer {
  ConstMXFP8View weight;         // [N, K] before padding
  bool full_precision;           // whether its input must not be quantised, on any device
  const CheckpointTensor* bias;  // null without one
};

using MXFP8Layers = std::map<std::string, MXFP8Layer>;
using Metadata = std::vector<std::pair<std::string, std::string>>;  // in the file's order

// A safetensors file, mapped into memory until the object is destroyed. Nobody may shorten the file
// meanwhile. Any number of threads may read.
class Checkpoint {
 public:
  // Reads and checks the header: its length, JSON and UTF-8, names that occur twice, the bytes of
  // every tensor, and that the tensors cover the data without gaps and overlaps.
  explicit Checkpoint(const std::filesystem::path& path);
  ~Checkpoint();
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;

  const std::filesystem::path& path() const;
  const std::map<std::string, CheckpointTensor>& tensors() const;
  const Metadata& metadata() const;

  // Throws CheckpointError if there is no such tensor.
  const CheckpointTensor& tensor(const std::string& name) const;

  // The MXFP8 layers whose names begin with `prefix`, by name; empty for a plain checkpoint. Reads
  // the `comfy_quant` tensors and `_quantization_metadata` in the header: either describes a layer,
  // and the header is believed if both do. A layer without a stated shape has that of its codes.
  //
  // Throws CheckpointError for a layer in another format, an FP8 weight that nothing describes, or
  // one that breaks a rule: missing tensors, other dtypes or shapes than the description implies.
  // The codes and scales themselves are not read.
  MXFP8Layers layers(const std::string& prefix = "") const;

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

// What a file to write holds.
class CheckpointPlan {
 public:
  Metadata metadata;  // without "_quantization_metadata", which the layers give

  // Throws InvalidArgument for a name that is taken, an unknown dtype or an impossible shape.
  void add_tensor(const std::string& name, TensorType type);

  // Adds codes, scales and description of a layer in MXFP8: "NAME.weight", "NAME.weight_scale" and
  // "NAME.comfy_quant", of which the last is written by CheckpointWriter. `rows` and `cols` are
  // those of the matrix before padding. Throws as add_tensor() does.
  void add_layer(const std::string& name, std::int64_t rows, std::int64_t cols,
                 bool full_precision = false);

 private:
  friend class CheckpointWriter;
  std::map<std::string, TensorType> tensors_;
  std::map<std::string, std::string> markers_;  // of layers
};

// A file that appears under its name when it is complete, or not at all. The parts of a tensor are
// written one after another, those of different tensors in any order. One thread at a time.
class CheckpointWriter {
 public:
  // Creates a hidden file beside `target`, or beside the file that a link leads to. Throws
  // CheckpointError if `target` exists, unless `overwrite` is given, and InvalidArgument if the
  // metadata has a key twice or one of its own.
  CheckpointWriter(const std::filesystem::path& target, const CheckpointPlan& plan,
                   bool overwrite = false);
  // Deletes the hidden file, unless finish() returned.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Appends to a tensor. Throws InvalidArgument for a name that is not in the plan, and for more
  // bytes than the tensor has.
  void write(const std::string& name, const void* data, std::size_t bytes);

  // Flushes the file to the disk and gives it its name. Throws InvalidArgument if a tensor is not
  // complete, and if the file has its name already.
  void finish();

 private:
  struct Output;
  std::unique_ptr<Output> output_;
};

}  // namespace zimage_mxfp8
