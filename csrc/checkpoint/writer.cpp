#include <optional>
#include <set>

#include "checkpoint/file.h"
#include "checkpoint/header.h"
#include "checkpoint/json.h"
#include "checkpoint/markers.h"
#include "zimage_mxfp8/checkpoint.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8 {
namespace {

void check_text(const std::string& text, const char* what) {
  for (std::size_t at = 0; at < text.size();) {
    if (!detail::next_code_point(text, at)) {
      throw InvalidArgument(std::string(what) + " is not UTF-8");
    }
  }
}

Metadata checked_metadata(const Metadata& metadata) {
  std::set<std::string> keys;
  for (const auto& [key, value] : metadata) {
    check_text(key, "a key of the metadata");
    check_text(value, "a value of the metadata");
    if (key == detail::kQuantizationMetadata) {
      throw InvalidArgument("the metadata has \"" + key + "\", which the plan's layers give");
    }
    if (!keys.insert(key).second) {
      throw InvalidArgument("the metadata has \"" + key + "\" twice");
    }
  }
  return metadata;
}

}  // namespace

void CheckpointPlan::add_tensor(const std::string& name, TensorType type) {
  check_text(name, "the name of a tensor");
  if (name == "__metadata__") {
    throw InvalidArgument("a tensor cannot have the name \"__metadata__\"");
  }
  if (!detail::find_dtype(type.dtype)) {
    throw InvalidArgument("tensor \"" + name + "\" has the unknown dtype \"" + type.dtype + "\"");
  }
  if (detail::tensor_bytes(type) < 0) {
    throw InvalidArgument("tensor \"" + name + "\" has the impossible shape " +
                          detail::shape_text(type.shape) + " of " + type.dtype);
  }
  if (!tensors_.emplace(name, std::move(type)).second) {
    throw InvalidArgument("the plan has a tensor \"" + name + "\" already");
  }
}

void CheckpointPlan::add_layer(const std::string& name, std::int64_t rows, std::int64_t cols,
                               bool full_precision) {
  constexpr std::int64_t most = std::int64_t{1} << 31;
  if (rows < 1 || cols < 1 || rows >= most || cols >= most) {
    throw InvalidArgument("layer \"" + name + "\" has the impossible shape " +
                          detail::shape_text({rows, cols}));
  }
  const MXFP8Shape shape{rows, cols};
  std::string marker = detail::layer_marker(rows, cols, full_precision);
  add_tensor(name + detail::kWeightSuffix, {"F8_E4M3", {shape.code_rows(), shape.code_cols()}});
  add_tensor(name + detail::kScaleSuffix, {"U8", {shape.scale_rows(), shape.scale_cols()}});
  add_tensor(name + detail::kMarkerSuffix, {"U8", {static_cast<std::int64_t>(marker.size())}});
  markers_.emplace(name, std::move(marker));
}

struct CheckpointWriter::Output {
  std::map<std::string, detail::TensorPlace> places;  // `begin` is where the next bytes go
  std::optional<detail::NewFile> file;
};

CheckpointWriter::CheckpointWriter(const std::filesystem::path& target, const CheckpointPlan& plan,
                                   bool overwrite)
    : output_(std::make_unique<Output>()) {
  Metadata metadata = checked_metadata(plan.metadata);
  if (!plan.markers_.empty()) {
    metadata.emplace_back(detail::kQuantizationMetadata,
                          detail::quantization_metadata(plan.markers_));
  }
  detail::Layout layout = detail::lay_out(target, plan.tensors_, metadata);
  output_->places = std::move(layout.places);
  output_->file.emplace(target, overwrite);
  output_->file->write(0, layout.header.data(), layout.header.size());
  for (const auto& [name, marker] : plan.markers_) {
    write(name + detail::kMarkerSuffix, marker.data(), marker.size());
  }
}

CheckpointWriter::~CheckpointWriter() = default;

void CheckpointWriter::write(const std::string& name, const void* data, std::size_t bytes) {
  const auto found = output_->places.find(name);
  if (found == output_->places.end()) {
    throw InvalidArgument("the plan has no tensor \"" + name + "\"");
  }
  detail::TensorPlace& place = found->second;
  if (bytes > static_cast<std::uint64_t>(place.end - place.begin)) {
    throw InvalidArgument("tensor \"" + name + "\" has " + std::to_string(place.end - place.begin) +
                          " bytes left, not " + std::to_string(bytes));
  }
  if (bytes > 0) output_->file->write(place.begin, data, bytes);
  place.begin += static_cast<std::int64_t>(bytes);
}

void CheckpointWriter::finish() {
  if (!output_->file) throw InvalidArgument("the file is finished");
  for (const auto& [name, place] : output_->places) {
    if (place.begin != place.end) {
      throw InvalidArgument("tensor \"" + name + "\" lacks " +
                            std::to_string(place.end - place.begin) + " bytes");
    }
  }
  output_->file->publish();
  output_->file.reset();
}

}  // namespace zimage_mxfp8
