#include "zimage_mxfp8/checkpoint.h"

#include "checkpoint/file.h"
#include "checkpoint/header.h"
#include "checkpoint/markers.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8 {

struct Checkpoint::Content {
  std::filesystem::path path;
  detail::MappedFile file;
  std::map<std::string, CheckpointTensor> tensors;
  Metadata metadata;

  explicit Content(const std::filesystem::path& named) : path(named), file(named) {
    detail::Header header = detail::parse_header(path, file.bytes());
    for (auto& [name, place] : header.tensors) {
      tensors.emplace(name,
                      CheckpointTensor{std::move(place.type.dtype), std::move(place.type.shape),
                                       file.bytes().data() + place.begin, place.end - place.begin});
    }
    metadata = std::move(header.metadata);
  }
};

Checkpoint::Checkpoint(const std::filesystem::path& path)
    : content_(std::make_unique<Content>(path)) {}
Checkpoint::~Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;

const std::filesystem::path& Checkpoint::path() const { return content_->path; }

const std::map<std::string, CheckpointTensor>& Checkpoint::tensors() const {
  return content_->tensors;
}

const Metadata& Checkpoint::metadata() const { return content_->metadata; }

const CheckpointTensor& Checkpoint::tensor(const std::string& name) const {
  const auto found = content_->tensors.find(name);
  if (found == content_->tensors.end()) {
    detail::fail(content_->path, "has no tensor \"" + name + "\"", "choose another file");
  }
  return found->second;
}

MXFP8Layers Checkpoint::layers(const std::string& prefix) const {
  return detail::find_layers(content_->path, content_->tensors, content_->metadata, prefix);
}

ConstMatrixView matrix_view(const CheckpointTensor& tensor) {
  const bool is_plain = tensor.dtype == "BF16" || tensor.dtype == "F16" || tensor.dtype == "F32";
  if (!is_plain || tensor.shape.empty() || tensor.shape.size() > 2) {
    throw InvalidArgument("a tensor is " + tensor.dtype + " " + detail::shape_text(tensor.shape) +
                          ", not a matrix or a vector of BF16, F16 or F32");
  }
  const DType dtype = tensor.dtype == "BF16"  ? DType::kBFloat16
                      : tensor.dtype == "F16" ? DType::kFloat16
                                              : DType::kFloat32;
  const std::int64_t rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
  const std::int64_t cols = tensor.shape.back();
  return {tensor.data, dtype, rows, cols, cols};
}

}  // namespace zimage_mxfp8
