// Converts a checkpoint in BF16, F16 or F32 to MXFP8, a few megabytes at a time: every matrix
// "NAME.weight", except those that a pattern names. Codes and scales are those that
// `zimage-mxfp8 convert` writes; biases stay as they are (`--bias-correction none`).
//
//   cmake -B build -Dzimage_mxfp8_DIR="$(zimage-mxfp8 --cmake-dir)" && cmake --build build
//   build/convert SOURCE TARGET [--recipe FILE] [--keep REGEX]... [--prefix PREFIX] [--overwrite]
//
// A recipe is a TOML file of the Python package; its lines `pattern = '...'` are read. With a
// prefix, such as model.diffusion_model., only tensors that have it are converted, and patterns
// see their names without it. What the source's header says of other quantised layers is left out,
// with a line about it.
#include <zimage_mxfp8/checkpoint.h>
#include <zimage_mxfp8/error.h>
#include <zimage_mxfp8/quantize.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

namespace zm = zimage_mxfp8;

namespace {

constexpr std::int64_t kTileRows = 128;           // scales of so many rows are contiguous
constexpr std::int64_t kChunkBytes = 16ll << 20;  // of the source that are encoded at once
const std::string kSuffix = ".weight";

struct Options {
  std::string source, target, prefix;
  std::vector<std::regex> keep;
  bool overwrite = false;
};

void read_recipe(const std::string& path, std::vector<std::regex>& patterns) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + " cannot be read");
  const std::regex line_with_pattern("^pattern *= *'(.*)'");
  std::string line;
  while (std::getline(file, line)) {
    std::smatch match;
    if (std::regex_search(line, match, line_with_pattern)) patterns.emplace_back(match[1].str());
  }
}

Options parse(int count, char** words) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> std::string {
      if (++i == count) throw std::invalid_argument(word + " needs a value");
      return words[i];
    };
    if (word == "--recipe") {
      read_recipe(value(), options.keep);
    } else if (word == "--keep") {
      options.keep.emplace_back(value());
    } else if (word == "--prefix") {
      options.prefix = value();
    } else if (word == "--overwrite") {
      options.overwrite = true;
    } else {
      files.push_back(word);
    }
  }
  if (files.size() != 2) throw std::invalid_argument("give a SOURCE and a TARGET");
  options.source = files[0];
  options.target = files[1];
  return options;
}

// Whether a tensor is to be converted.
bool is_chosen(const Options& options, const std::string& name,
               const zm::CheckpointTensor& tensor) {
  const bool is_weight = name.size() > kSuffix.size() &&
                         name.compare(name.size() - kSuffix.size(), kSuffix.size(), kSuffix) == 0;
  const bool is_plain = tensor.dtype == "BF16" || tensor.dtype == "F16" || tensor.dtype == "F32";
  if (!is_weight || !is_plain || tensor.shape.size() != 2 || tensor.bytes == 0) return false;
  if (name.compare(0, options.prefix.size(), options.prefix) != 0) return false;
  const std::string inner = name.substr(options.prefix.size());
  return std::none_of(options.keep.begin(), options.keep.end(),
                      [&](const std::regex& pattern) { return std::regex_search(inner, pattern); });
}

void encode(const zm::ConstMatrixView& matrix, const std::string& layer,
            zm::CheckpointWriter& writer) {
  const auto row_bytes = matrix.cols * static_cast<std::int64_t>(zm::element_size(matrix.dtype));
  const std::int64_t step = std::max(kTileRows, kChunkBytes / row_bytes / kTileRows * kTileRows);
  std::vector<std::uint8_t> codes, scales;
  for (std::int64_t row = 0; row < matrix.rows; row += step) {
    zm::ConstMatrixView chunk = matrix;
    chunk.data = static_cast<const char*>(matrix.data) + row * row_bytes;
    chunk.rows = std::min(step, matrix.rows - row);
    const zm::MXFP8Shape shape{chunk.rows, chunk.cols};
    codes.resize(static_cast<std::size_t>(shape.code_bytes()));
    scales.resize(static_cast<std::size_t>(shape.scale_bytes()));
    try {
      zm::quantize(chunk, zm::MXFP8View{codes.data(), scales.data(), chunk.rows, chunk.cols});
    } catch (const zm::NonFiniteValue& error) {
      throw std::runtime_error("tensor \"" + layer + kSuffix + "\" has NaN or infinity at row " +
                               std::to_string(row + error.row()) + ", column " +
                               std::to_string(error.column()) + "; keep it with a pattern");
    }
    writer.write(layer + kSuffix, codes.data(), codes.size());
    writer.write(layer + ".weight_scale", scales.data(), scales.size());
  }
}

void convert(const Options& options) {
  const zm::Checkpoint source(options.source);
  if (!source.layers(options.prefix).empty()) {
    throw std::runtime_error(options.source + " is in MXFP8 already");
  }
  zm::CheckpointPlan plan;
  bool has_others = false;  // descriptions of layers that are not converted here
  for (const auto& [key, value] : source.metadata()) {
    if (key == "_quantization_metadata") {
      has_others = true;
    } else {
      plan.metadata.emplace_back(key, value);
    }
  }
  int layers = 0;
  for (const auto& [name, tensor] : source.tensors()) {
    if (is_chosen(options, name, tensor)) {
      plan.add_layer(name.substr(0, name.size() - kSuffix.size()), tensor.shape[0],
                     tensor.shape[1]);
      ++layers;
    } else {
      plan.add_tensor(name, {tensor.dtype, tensor.shape});
    }
  }
  zm::CheckpointWriter writer(options.target, plan, options.overwrite);
  for (const auto& [name, tensor] : source.tensors()) {
    if (is_chosen(options, name, tensor)) {
      encode(zm::matrix_view(tensor), name.substr(0, name.size() - kSuffix.size()), writer);
    } else {
      writer.write(name, tensor.data, static_cast<std::size_t>(tensor.bytes));
    }
  }
  writer.finish();
  std::printf("%d layers in MXFP8: %s\n", layers, options.target.c_str());
  if (has_others) {
    std::fprintf(stderr,
                 "convert: the header of %s describes other quantised layers, and these "
                 "descriptions are left out; zimage-mxfp8 convert keeps them\n",
                 options.source.c_str());
  }
}

}  // namespace

int main(int count, char** words) {
  try {
    convert(parse(count, words));
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr,
                 "convert: %s\nusage: convert SOURCE TARGET [--recipe FILE] [--keep REGEX]... "
                 "[--prefix PREFIX] [--overwrite]\n",
                 error.what());
    return 2;
  } catch (const std::regex_error& error) {
    std::fprintf(stderr, "convert: a pattern is not a regular expression: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "convert: %s\n", error.what());
    return 1;
  }
}
