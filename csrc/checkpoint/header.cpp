#include "checkpoint/header.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

#include "checkpoint/json.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the safetensors library's own limit
constexpr const char* kMetadata = "__metadata__";

constexpr DTypeInfo kDTypes[] = {
    {"U64", 64},    {"I64", 64},        {"F64", 64},        {"C64", 64},    {"F32", 32},
    {"U32", 32},    {"I32", 32},        {"BF16", 16},       {"F16", 16},    {"U16", 16},
    {"I16", 16},    {"F8_E5M2FNUZ", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E8M0", 8}, {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"I8", 8},          {"U8", 8},          {"F6_E3M2", 6}, {"F6_E2M3", 6},
    {"F4", 4},      {"BOOL", 8},
};

std::string in_quotes(const std::string& name) { return "\"" + name + "\""; }

JsonObject parse_object(const std::filesystem::path& path, std::string_view text) {
  try {
    const JsonValue document = parse_json(text);
    if (const auto* object = document.get<JsonObject>()) return *object;
  } catch (const JsonDuplicate& error) {
    fail(path, "has the name " + in_quotes(error.name()) + " twice in its header");
  } catch (const JsonError& error) {
    fail(path, std::string("has a header that is not JSON (") + error.what() + ")");
  }
  fail(path, "has a header that is not a JSON object");
}

Metadata parse_metadata(const std::filesystem::path& path, const JsonValue& value) {
  Metadata metadata;
  if (value.is_null()) return metadata;  // the library reads it as none
  const auto* object = value.get<JsonObject>();
  bool is_text = object != nullptr;
  for (std::size_t i = 0; is_text && i < object->size(); ++i) {
    const auto& [key, entry] = (*object)[i];
    const auto* text = entry.get<std::string>();
    is_text = text != nullptr;
    if (is_text) metadata.emplace_back(key, *text);
  }
  if (!is_text) fail(path, "has a __metadata__ that does not map strings to strings");
  return metadata;
}

// A list of sizes of 0 or more, or nullopt.
std::optional<std::vector<std::int64_t>> sizes_of(const JsonValue& value) {
  const auto* array = value.get<JsonArray>();
  if (!array) return std::nullopt;
  std::vector<std::int64_t> sizes;
  for (const JsonValue& element : *array) {
    const auto* number = element.get<JsonNumber>();
    if (!number || !number->integer || *number->integer < 0) return std::nullopt;
    sizes.push_back(*number->integer);
  }
  return sizes;
}

TensorPlace parse_entry(const std::filesystem::path& path, const std::string& name,
                        const JsonValue& value, std::int64_t data_begin) {
  const auto* entry = value.get<JsonObject>();
  const JsonValue* dtype = entry ? find(*entry, "dtype") : nullptr;
  const JsonValue* shape = entry ? find(*entry, "shape") : nullptr;
  const JsonValue* offsets = entry ? find(*entry, "data_offsets") : nullptr;
  if (!dtype || !shape || !offsets || entry->size() != 3) {
    fail(path, "has a header entry " + in_quotes(name) + " without exactly dtype, shape and " +
                   "data_offsets");
  }
  const std::string gives = "gives tensor " + in_quotes(name) + " ";
  const auto* dtype_name = dtype->get<std::string>();
  if (!dtype_name || !find_dtype(*dtype_name)) {
    fail(path, gives + (dtype_name ? "the unknown dtype " + in_quotes(*dtype_name)
                                   : std::string("a dtype that is not a string")));
  }
  const auto sizes = sizes_of(*shape);
  if (!sizes) fail(path, gives + "a shape that is not a list of sizes");
  const auto range = sizes_of(*offsets);
  if (!range || range->size() != 2 || (*range)[0] > (*range)[1]) {
    fail(path, gives + "data_offsets that are not [begin, end]");
  }
  const std::int64_t begin = (*range)[0], end = (*range)[1];
  const TensorType type{*dtype_name, *sizes};
  const std::int64_t needed = tensor_bytes(type);
  if (needed != end - begin) {
    fail(path, gives + std::to_string(end - begin) + " bytes, but " + type.dtype + " " +
                   shape_text(type.shape) + " needs " +
                   (needed < 0 ? "more than a file can hold, or a part of a byte"
                               : std::to_string(needed)));
  }
  if (end > std::numeric_limits<std::int64_t>::max() - data_begin) {
    fail(path, gives + "data_offsets that no file can have");
  }
  return {type, data_begin + begin, data_begin + end};
}

void check_coverage(const std::filesystem::path& path,
                    const std::map<std::string, TensorPlace>& tensors, std::int64_t data_begin,
                    std::int64_t file_bytes) {
  std::vector<std::pair<const std::string*, const TensorPlace*>> in_order;
  for (const auto& [name, place] : tensors) in_order.emplace_back(&name, &place);
  std::stable_sort(in_order.begin(), in_order.end(), [](const auto& one, const auto& other) {
    return std::pair(one.second->begin, one.second->end) <
           std::pair(other.second->begin, other.second->end);
  });
  std::int64_t position = data_begin;
  std::string previous;
  for (const auto& [name, place] : in_order) {
    if (place->begin < position) {
      fail(path, "has tensors that overlap: " + in_quotes(previous) + " and " + in_quotes(*name));
    }
    if (place->begin > position) {
      fail(path, "has " + std::to_string(place->begin - position) + " unused bytes before tensor " +
                     in_quotes(*name));
    }
    if (place->end > file_bytes) {
      fail(path, "is truncated: tensor " + in_quotes(*name) + " ends at byte " +
                     std::to_string(place->end) + ", the file has " + std::to_string(file_bytes));
    }
    position = place->end;
    previous = *name;
  }
  if (position != file_bytes) {
    fail(path, "has " + std::to_string(file_bytes - position) +
                   " bytes after its last tensor, so its header and its data do not belong "
                   "together");
  }
}

}  // namespace

const DTypeInfo* find_dtype(const std::string& name) {
  for (const DTypeInfo& info : kDTypes) {
    if (name == info.name) return &info;
  }
  return nullptr;
}

void fail(const std::filesystem::path& path, const std::string& what, const std::string& remedy) {
  throw CheckpointError(path.u8string() + " " + what + "; " + remedy);
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::int64_t tensor_bytes(const TensorType& type) {
  const auto smallest = std::min_element(type.shape.begin(), type.shape.end());
  if (smallest != type.shape.end() && *smallest <= 0) return *smallest < 0 ? -1 : 0;
  std::int64_t bits = find_dtype(type.dtype)->bits;
  for (const std::int64_t size : type.shape) {
    if (bits > std::numeric_limits<std::int64_t>::max() / size) return -1;
    bits *= size;
  }
  return bits % 8 == 0 ? bits / 8 : -1;
}

Header parse_header(const std::filesystem::path& path, std::string_view file) {
  const std::string file_bytes = std::to_string(file.size());
  if (file.size() < kLengthBytes) {
    fail(path, "is not a safetensors file: it has only " + file_bytes + " bytes");
  }
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | static_cast<unsigned char>(file[i]);
  }
  if (length > file.size() - kLengthBytes) {
    fail(path, "is truncated or not a safetensors file: its header should have " +
                   std::to_string(length) + " bytes, the file has " + file_bytes);
  }
  if (length > kMaxHeaderBytes) {
    fail(path,
         "has a header of " + std::to_string(length) + " bytes, over the format's limit of 100 MB");
  }
  const JsonObject entries =
      parse_object(path, file.substr(kLengthBytes, static_cast<std::size_t>(length)));
  const auto data_begin = static_cast<std::int64_t>(kLengthBytes + length);
  Header header;
  for (const auto& [name, value] : entries) {
    if (name == kMetadata) {
      header.metadata = parse_metadata(path, value);
    } else {
      header.tensors.emplace(name, parse_entry(path, name, value, data_begin));
    }
  }
  check_coverage(path, header.tensors, data_begin, static_cast<std::int64_t>(file.size()));
  return header;
}

Layout lay_out(const std::filesystem::path& path, const std::map<std::string, TensorType>& tensors,
               const Metadata& metadata) {
  std::vector<const std::pair<const std::string, TensorType>*> order;
  for (const auto& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const auto* one, const auto* other) {
    return find_dtype(one->second.dtype) < find_dtype(other->second.dtype);  // places in the table
  });

  std::string text;
  const auto add = [&](const std::string& name, const std::string& value) {
    text += (text.empty() ? "{" : ",") + quote_json(name) + ":" + value;
  };
  if (!metadata.empty()) {
    std::string entries;
    for (const auto& [key, value] : metadata) {
      entries += (entries.empty() ? "" : ",") + quote_json(key) + ":" + quote_json(value);
    }
    add(kMetadata, "{" + entries + "}");
  }
  Layout layout;
  std::int64_t end = 0;
  for (const auto* tensor : order) {
    const auto& [name, type] = *tensor;
    const std::int64_t begin = end, bytes = tensor_bytes(type);
    if (bytes > std::numeric_limits<std::int64_t>::max() / 2 - begin) {
      fail(path, "would be larger than a file can be", "write fewer tensors");
    }
    end = begin + bytes;
    std::string shape;
    for (const std::int64_t size : type.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(size);
    }
    add(name, "{\"dtype\":" + quote_json(type.dtype) + ",\"shape\":[" + shape +
                  "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) +
                  "]}");
    layout.places.emplace(name, TensorPlace{type, begin, end});
  }
  text += text.empty() ? "{}" : "}";
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');
  if (text.size() > kMaxHeaderBytes) {
    fail(path,
         "would have a header of " + std::to_string(text.size()) +
             " bytes, over the format's limit of 100 MB",
         "write fewer tensors");
  }
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    layout.header += static_cast<char>(std::uint64_t{text.size()} >> (8 * i) & 0xFF);
  }
  layout.header += text;
  const auto data_begin = static_cast<std::int64_t>(layout.header.size());
  for (auto& [name, place] : layout.places) {
    place.begin += data_begin;
    place.end += data_begin;
  }
  layout.file_bytes = data_begin + end;
  return layout;
}

}  // namespace zimage_mxfp8::detail
