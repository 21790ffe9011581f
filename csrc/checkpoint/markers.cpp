#include "checkpoint/markers.h"

#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "checkpoint/header.h"
#include "checkpoint/json.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr std::int64_t kMaxMarkerBytes = 4096;  // a marker has about 100
constexpr const char* kFormat = "mxfp8";
constexpr const char* kFullPrecision = "full_precision_matrix_mult";
constexpr const char* kAgain = "convert the original again";

using Tensors = std::map<std::string, CheckpointTensor>;

bool begins_with(std::string_view text, std::string_view begin) {
  return text.substr(0, begin.size()) == begin;
}

// The part of a name before a suffix, or nullopt.
std::optional<std::string> without_suffix(const std::string& name, std::string_view suffix) {
  if (name.size() < suffix.size() || name.substr(name.size() - suffix.size()) != suffix) {
    return std::nullopt;
  }
  return name.substr(0, name.size() - suffix.size());
}

bool is_true(const JsonValue& value) {
  if (const auto* boolean = value.get<bool>()) return *boolean;
  if (const auto* number = value.get<JsonNumber>()) return !number->is_zero;
  if (const auto* text = value.get<std::string>()) return !text->empty();
  if (const auto* array = value.get<JsonArray>()) return !array->empty();
  if (const auto* object = value.get<JsonObject>()) return !object->empty();
  return false;
}

struct Shape {
  std::int64_t rows, cols;
};

// What a marker or an entry of the header says about a layer.
struct Description {
  std::string format;
  bool full_precision = false;
  std::optional<Shape> shape;

  explicit Description(const JsonObject& entry) {
    const JsonValue* const named = find(entry, "format");
    if (named && named->get<std::string>()) format = *named->get<std::string>();
    const JsonValue* const full = find(entry, kFullPrecision);
    full_precision = full && is_true(*full);
    const JsonValue* const stated = find(entry, "orig_shape");
    const auto* sizes = stated ? stated->get<JsonArray>() : nullptr;
    if (sizes && sizes->size() == 2) {
      const auto rows = size_of((*sizes)[0]), cols = size_of((*sizes)[1]);
      if (rows && cols) shape = Shape{*rows, *cols};
    }
  }

 private:
  static std::optional<std::int64_t> size_of(const JsonValue& value) {
    const auto* number = value.get<JsonNumber>();
    if (!number || !number->integer || *number->integer < 1 ||
        *number->integer >= std::int64_t{1} << 31) {
      return std::nullopt;
    }
    return number->integer;
  }
};

class Finder {
 public:
  Finder(const std::filesystem::path& path, const Tensors& tensors, const Metadata& metadata,
         const std::string& prefix)
      : path_(path), tensors_(tensors), prefix_(prefix) {
    read_metadata(metadata);
    for (const auto& [name, tensor] : tensors) {
      if (begins_with(name, prefix)) read_tensor(name, tensor);
    }
  }

  MXFP8Layers find() const {
    MXFP8Layers layers;
    for (const std::string& name : names_) layers.emplace(name, layer(name));
    return layers;
  }

 private:
  [[noreturn]] void breach(const std::string& tensor, const std::string& problem) const {
    throw CheckpointError(path_.u8string() + ": \"" + tensor + "\" " + problem + "; " + kAgain);
  }

  const CheckpointTensor* tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  // Describes layers by the header, which may leave out the prefix.
  void read_metadata(const Metadata& metadata) {
    for (const auto& [key, text] : metadata) {
      if (key != kQuantizationMetadata) continue;
      const JsonValue document = parse(key, text);
      const auto* object = document.get<JsonObject>();
      const JsonValue* layers = object ? detail::find(*object, "layers") : nullptr;
      const auto* entries = layers ? layers->get<JsonObject>() : nullptr;
      if (!entries) breach(key, "is not {\"layers\": {...}} in JSON");
      for (const auto& [name, value] : *entries) {
        const auto* entry = value.get<JsonObject>();
        const bool is_whole =
            begins_with(name, prefix_) && (prefix_.empty() || tensor(name + kWeightSuffix));
        const std::string layer = is_whole ? name : prefix_ + name;
        if (!prefix_.empty() && !tensor(layer + kWeightSuffix)) continue;  // another model's
        if (!entry) breach(key, "has an entry \"" + name + "\" that is not a JSON object");
        headers_.insert_or_assign(layer, Description(*entry));
        names_.insert(layer);
      }
    }
  }

  JsonValue parse(const std::string& name, std::string_view text) const {
    try {
      return parse_json(text);
    } catch (const JsonError&) {
      breach(name, "is not JSON");
    }
  }

  void read_tensor(const std::string& name, const CheckpointTensor& tensor) {
    if (const auto marked = without_suffix(name, kMarkerSuffix)) {
      if (tensor.dtype != "U8" || tensor.shape.size() != 1 || tensor.bytes > kMaxMarkerBytes) {
        breach(name,
               "is " + tensor.dtype + " " + shape_text(tensor.shape) + ", not a short list of U8");
      }
      const JsonValue document = parse(
          name, {static_cast<const char*>(tensor.data), static_cast<std::size_t>(tensor.bytes)});
      const auto* entry = document.get<JsonObject>();
      if (!entry) breach(name, "is not a JSON object");
      markers_.insert_or_assign(*marked, Description(*entry));
      names_.insert(*marked);
    } else if (const auto scaled = without_suffix(name, kScaleSuffix)) {
      names_.insert(*scaled);
    } else if (const auto weight = without_suffix(name, kWeightSuffix)) {
      if (begins_with(tensor.dtype, "F8_")) names_.insert(*weight);
    }
  }

  MXFP8Layer layer(const std::string& name) const {
    const CheckpointTensor* const weight = tensor(name + kWeightSuffix);
    const CheckpointTensor* const scales = tensor(name + kScaleSuffix);
    if (!weight) {
      breach(name + kWeightSuffix, "is missing, though the file describes it as quantised");
    }
    const Description& described = description(name);
    if (!scales) breach(name + kScaleSuffix, "is missing");
    if (weight->dtype != "F8_E4M3" || weight->shape.size() != 2) {
      breach(name + kWeightSuffix,
             "is " + weight->dtype + " " + shape_text(weight->shape) + ", not a F8_E4M3 matrix");
    }
    const MXFP8Shape shape = shape_of(name, described, *weight);
    const std::vector<std::int64_t> blocked{shape.scale_rows(), shape.scale_cols()};
    if (scales->dtype != "U8" && scales->dtype != "F8_E8M0") {
      breach(name + kScaleSuffix, "is " + scales->dtype + ", not U8 or F8_E8M0");
    }
    if (scales->shape != blocked) {
      breach(name + kScaleSuffix, "is " + shape_text(scales->shape) +
                                      ", but the blocked scales are " + shape_text(blocked));
    }
    return {{static_cast<const std::uint8_t*>(weight->data),
             static_cast<const std::uint8_t*>(scales->data), shape.rows, shape.cols},
            described.full_precision,
            tensor(name + ".bias")};
  }

  // The description that counts. Throws unless it is MXFP8's.
  const Description& description(const std::string& name) const {
    const auto marker = markers_.find(name), header = headers_.find(name);
    const bool marked = marker != markers_.end(), listed = header != headers_.end();
    if (!marked && !listed) {
      breach(name + kMarkerSuffix,
             "is missing, and the header does not describe the layer: its codes would be loaded "
             "without scales");
    }
    const Description& believed = listed ? header->second : marker->second;
    if (believed.format != kFormat) {
      breach(
          listed ? kQuantizationMetadata : name + kMarkerSuffix,
          "has the format \"" + believed.format + "\" for layer \"" + name + "\", not \"mxfp8\"");
    }
    if (marked && listed &&
        (marker->second.format != believed.format ||
         marker->second.full_precision != believed.full_precision)) {
      breach(kQuantizationMetadata,
             "disagrees about layer \"" + name +
                 "\" with its comfy_quant tensor, and the header is believed");
    }
    return believed;
  }

  MXFP8Shape shape_of(const std::string& name, const Description& described,
                      const CheckpointTensor& weight) const {
    const auto& codes = weight.shape;
    if (weight.bytes == 0) breach(name + kWeightSuffix, "is " + shape_text(codes) + ", so empty");
    const Shape stated = described.shape.value_or(Shape{codes[0], codes[1]});
    const MXFP8Shape shape{stated.rows, stated.cols};
    const std::vector<std::int64_t> padded{shape.code_rows(), shape.code_cols()};
    if (codes != padded) {
      breach(name + kWeightSuffix,
             "is " + shape_text(codes) +
                 (described.shape ? ", but " + shape_text({shape.rows, shape.cols}) +
                                        " padded to 32 is " + shape_text(padded)
                                  : std::string(", not padded to multiples of 32")));
    }
    return shape;
  }

  const std::filesystem::path& path_;
  const Tensors& tensors_;
  const std::string& prefix_;
  std::map<std::string, Description> markers_, headers_;
  std::set<std::string> names_;  // of layers that seem to be quantised
};

}  // namespace

std::string layer_marker(std::int64_t rows, std::int64_t cols, bool full_precision) {
  return std::string("{\"format\": \"") + kFormat + "\", \"group_size\": 32, " +
         "\"orig_dtype\": \"torch.bfloat16\", \"orig_shape\": " + shape_text({rows, cols}) +
         (full_precision ? std::string(", \"") + kFullPrecision + "\": true}" : std::string("}"));
}

std::string quantization_metadata(const std::map<std::string, std::string>& markers) {
  std::string layers;
  for (const auto& [name, marker] : markers) {
    layers += (layers.empty() ? "" : ", ") + quote_json_in_ascii(name) + ": " + marker;
  }
  return "{\"format_version\": \"1.0\", \"layers\": {" + layers + "}}";
}

MXFP8Layers find_layers(const std::filesystem::path& path, const Tensors& tensors,
                        const Metadata& metadata, const std::string& prefix) {
  return Finder(path, tensors, metadata, prefix).find();
}

}  // namespace zimage_mxfp8::detail
