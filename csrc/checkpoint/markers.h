// The descriptions of MXFP8 layers in a file: `comfy_quant` tensors, and `_quantization_metadata`
// in the header.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include "zimage_mxfp8/checkpoint.h"

namespace zimage_mxfp8::detail {

inline constexpr const char* kQuantizationMetadata = "_quantization_metadata";
inline constexpr const char* kWeightSuffix = ".weight";
inline constexpr const char* kScaleSuffix = ".weight_scale";
inline constexpr const char* kMarkerSuffix = ".comfy_quant";

// The description of a layer, as a `comfy_quant` tensor holds it.
std::string layer_marker(std::int64_t rows, std::int64_t cols, bool full_precision);

// The header's `_quantization_metadata` for layers with these markers.
std::string quantization_metadata(const std::map<std::string, std::string>& markers);

// See Checkpoint::layers().
MXFP8Layers find_layers(const std::filesystem::path& path,
                        const std::map<std::string, CheckpointTensor>& tensors,
                        const Metadata& metadata, const std::string& prefix);

}  // namespace zimage_mxfp8::detail
