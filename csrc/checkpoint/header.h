// The header of a safetensors file. 8 bytes of length (little-endian), that many bytes of JSON
// (padded with spaces), then the data: https://github.com/huggingface/safetensors, "Format".
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "zimage_mxfp8/checkpoint.h"

namespace zimage_mxfp8::detail {

// Bits of an element, and the place of the type in a file: the widest come first. Null for an
// unknown dtype.
struct DTypeInfo {
  const char* name;
  std::int64_t bits;
};
const DTypeInfo* find_dtype(const std::string& name);

// Throws CheckpointError: the path, what is wrong, and how to repair it.
[[noreturn]] void fail(const std::filesystem::path& path, const std::string& what,
                       const std::string& remedy = "download or export it again");

// "[2, 3]"
std::string shape_text(const std::vector<std::int64_t>& shape);

// Where a tensor is in a file.
struct TensorPlace {
  TensorType type;
  std::int64_t begin, end;  // bytes from the file's begin
};

struct Header {
  std::map<std::string, TensorPlace> tensors;
  Metadata metadata;
};

// Checks and parses the header of a file in memory. Throws CheckpointError.
Header parse_header(const std::filesystem::path& path, std::string_view file);

// The first bytes of a file with these tensors, and their places: as the safetensors library
// chooses them. Throws CheckpointError if the header would be larger than the format allows.
struct Layout {
  std::string header;
  std::map<std::string, TensorPlace> places;
  std::int64_t file_bytes;
};
Layout lay_out(const std::filesystem::path& path, const std::map<std::string, TensorType>& tensors,
               const Metadata& metadata);

// Bytes of a tensor of a known dtype; -1 if they are more than 2^63 or not whole bytes.
std::int64_t tensor_bytes(const TensorType& type);

}  // namespace zimage_mxfp8::detail
