#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "zimage_mxfp8/checkpoint.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/quantize.h"

using namespace zimage_mxfp8;

namespace {

// A folder of its own for each test case.
class Folder {
 public:
  Folder() {
    static int count = 0;
    std::random_device random;
    path_ = std::filesystem::temp_directory_path() /
            ("zm-" + std::to_string(random()) + "-" + std::to_string(count++));
    std::filesystem::create_directory(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::filesystem::path operator/(const char* name) const { return path_ / name; }
  std::size_t files() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

void save(const std::filesystem::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

void save(const std::filesystem::path& path, const std::string& header, const std::string& data) {
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xFF);
  save(path, length + header + data);
}

template <typename Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  CAPTURE(text);
  CAPTURE(part);
  const bool found = text.find(part) != text.npos;
  CHECK(found);
  return found;
}

}  // namespace

TEST_CASE("a file is read as it was written by hand") {
  const Folder folder;
  save(folder / "a",
       R"({"__metadata__":{"z":"1","a":"\u00e9"},)"
       R"("m":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
       R"("empty":{"dtype":"U8","shape":[0,4611686018427387904,4611686018427387904],)"
       R"("data_offsets":[8,8]},"s":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}  )",
       std::string("\0\0\x80\x3F\0\0\0\x40!", 9));
  const Checkpoint checkpoint(folder / "a");
  CHECK(checkpoint.tensors().size() == 3);
  CHECK(checkpoint.metadata() == Metadata{{"z", "1"}, {"a", "\xC3\xA9"}});
  const CheckpointTensor& m = checkpoint.tensor("m");
  CHECK(m.dtype == "F32");
  CHECK(m.shape == std::vector<std::int64_t>{1, 2});
  float values[2];
  REQUIRE(m.bytes == sizeof values);
  std::memcpy(values, m.data, sizeof values);
  CHECK(values[0] == 1.0f);
  CHECK(values[1] == 2.0f);
  CHECK(checkpoint.tensor("empty").bytes == 0);
  CHECK(*static_cast<const char*>(checkpoint.tensor("s").data) == '!');
  CHECK(checkpoint.layers().empty());
  CHECK(has(error_of([&] { checkpoint.tensor("none"); }), "has no tensor \"none\""));
  CHECK(matrix_view(m).cols == 2);
  CHECK_THROWS_AS(matrix_view(checkpoint.tensor("s")), InvalidArgument);
}

TEST_CASE("a damaged header is refused in a sentence that names file and tensor") {
  const Folder folder;
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return "{\"w\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets +
           "}}";
  };
  const struct {
    std::string header, data, problem;
  } cases[] = {
      {"[]", "", "not a JSON object"},
      {"{", "", "not JSON"},
      {"{\"\xFF\":1}", "", "not JSON (byte 2: not UTF-8)"},
      {R"({"a":1,"a":2})", "", "the name \"a\" twice"},
      {R"({"__metadata__":{"a":1}})", "", "strings to strings"},
      {R"({"w":[]})", "", "entry \"w\" without exactly"},
      {R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", "!", "without exactly"},
      {entry("\"U9\"", "[1]", "[0,1]"), "!", "tensor \"w\" the unknown dtype \"U9\""},
      {entry("8", "[1]", "[0,1]"), "!", "not a string"},
      {entry("\"U8\"", "[-1]", "[0,1]"), "!", "not a list of sizes"},
      {entry("\"U8\"", "[1.0]", "[0,1]"), "!", "not a list of sizes"},
      {entry("\"U8\"", "[true]", "[0,1]"), "!", "not a list of sizes"},
      {entry("\"U8\"", "[1]", "[1,0]"), "!", "not [begin, end]"},
      {entry("\"U8\"", "[1]", "[0,1,2]"), "!", "not [begin, end]"},
      {entry("\"U8\"", "[2]", "[0,1]"), "!", "1 bytes, but U8 [2] needs 2"},
      {entry("\"F4\"", "[1]", "[0,1]"), "!", "a part of a byte"},
      {entry("\"U8\"", "[4294967296,4294967296]", "[0,0]"), "", "more than a file can hold"},
      {entry("\"U8\"", "[1]", "[9223372036854775806,9223372036854775807]"), "", "no file"},
      {entry("\"U8\"", "[1]", "[1,2]"), "!!", "1 unused bytes before tensor \"w\""},
      {entry("\"U8\"", "[2]", "[0,2]"), "!", "truncated: tensor \"w\""},
      {entry("\"U8\"", "[1]", "[0,1]"), "!!", "1 bytes after its last tensor"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       "!!!", "overlap: \"a\" and \"b\""},
  };
  for (const auto& one : cases) {
    save(folder / "bad.safetensors", one.header, one.data);
    const std::string error = error_of([&] { Checkpoint(folder / "bad.safetensors"); });
    CHECK(has(error, one.problem));
    CHECK(has(error, "bad.safetensors"));
    CHECK(has(error, "; "));
  }
}

TEST_CASE("what is not a safetensors file is refused") {
  const Folder folder;
  CHECK(has(error_of([&] { Checkpoint(folder / "none"); }), "cannot be read"));
  CHECK(has(error_of([&] { Checkpoint(folder / "."); }), "not a regular file"));
  save(folder / "empty", "");
  CHECK(has(error_of([&] { Checkpoint(folder / "empty"); }), "has only 0 bytes"));
  save(folder / "text", "this is a text, and a longer one");
  CHECK(has(error_of([&] { Checkpoint(folder / "text"); }), "truncated or not a safetensors"));
}

TEST_CASE("a written file has the bytes of the library's layout") {
  const Folder folder;
  CheckpointPlan plan;
  plan.metadata = {{"b", "x\n"}, {"a", "\xC3\xA9"}};
  plan.add_tensor("byte", {"U8", {3}});
  plan.add_tensor("wide", {"F32", {1}});
  plan.add_tensor("also", {"U8", {}});
  CheckpointWriter writer(folder / "out", plan);
  writer.write("byte", "12", 2);
  writer.write("wide", "abcd", 4);
  writer.write("also", "!", 1);
  CHECK_FALSE(std::filesystem::exists(folder / "out"));
  CHECK(has(error_of([&] { writer.finish(); }), "\"byte\" lacks 1 bytes"));
  writer.write("byte", "3", 1);
  CHECK(has(error_of([&] { writer.write("byte", "4", 1); }), "0 bytes left"));
  CHECK(has(error_of([&] { writer.write("none", "4", 1); }), "no tensor \"none\""));
  writer.finish();
  CHECK(has(error_of([&] { writer.finish(); }), "is finished"));
  CHECK(folder.files() == 1);
  std::string header =
      "{\"__metadata__\":{\"b\":\"x\\n\",\"a\":\"\xC3\xA9\"},"
      R"("wide":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("also":{"dtype":"U8","shape":[],"data_offsets":[4,5]},)"
      R"("byte":{"dtype":"U8","shape":[3],"data_offsets":[5,8]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string length(8, '\0');
  length[0] = static_cast<char>(header.size() & 0xFF);
  length[1] = static_cast<char>(header.size() >> 8);
  CHECK(content_of(folder / "out") == length + header + "abcd!123");
}

TEST_CASE("a file is written whole or not at all, and replaced only on demand") {
  const Folder folder;
  CheckpointPlan plan;
  plan.add_tensor("a", {"U8", {1}});
  {
    CheckpointWriter abandoned(folder / "out", plan);
  }
  CHECK(folder.files() == 0);
  save(folder / "out", "old");
  CHECK(has(error_of([&] { CheckpointWriter(folder / "out", plan); }), "exists"));
  CHECK(content_of(folder / "out") == "old");
  {
    CheckpointWriter writer(folder / "out", plan, true);
    writer.write("a", "!", 1);
    CHECK(content_of(folder / "out") == "old");
    writer.finish();
  }
  CHECK(content_of(folder / "out").back() == '!');
  std::error_code failed;
  std::filesystem::create_symlink("out", folder / "link", failed);
  if (!failed) {  // Windows may not allow it
    CHECK(has(error_of([&] { CheckpointWriter(folder / "link", plan); }), "out exists"));
    CheckpointWriter writer(folder / "link", plan, true);
    writer.write("a", "?", 1);
    writer.finish();
    CHECK(std::filesystem::is_symlink(folder / "link"));
    CHECK(content_of(folder / "out").back() == '?');
    std::filesystem::remove(folder / "out");  // the link leads to nothing
    CheckpointWriter again(folder / "link", plan, true);
    again.write("a", ".", 1);
    again.finish();
    CHECK(std::filesystem::is_symlink(folder / "link"));
    CHECK(content_of(folder / "out").back() == '.');
  }
  CheckpointWriter late(folder / "late", plan);
  late.write("a", "!", 1);
  save(folder / "late", "another's");
  CHECK(has(error_of([&] { late.finish(); }), "exists"));
  CHECK(content_of(folder / "late") == "another's");
  CHECK(has(error_of([&] { CheckpointWriter(folder / "none" / "out", plan); }), "be written"));
}

TEST_CASE("a plan refuses what a file cannot hold") {
  CheckpointPlan plan;
  plan.add_tensor("a", {"U8", {1}});
  CHECK_THROWS_AS(plan.add_tensor("a", {"U8", {1}}), InvalidArgument);
  CHECK_THROWS_AS(plan.add_tensor("__metadata__", {"U8", {1}}), InvalidArgument);
  CHECK_THROWS_AS(plan.add_tensor("\xFF", {"U8", {1}}), InvalidArgument);
  CHECK_THROWS_AS(plan.add_tensor("b", {"U9", {1}}), InvalidArgument);
  CHECK_THROWS_AS(plan.add_tensor("b", {"U8", {-1}}), InvalidArgument);
  CHECK_THROWS_AS(plan.add_tensor("b", {"F32", {-1, 0}}), InvalidArgument);
  CHECK_THROWS_AS(plan.add_layer("b", 0, 1), InvalidArgument);
  const Folder folder;
  plan.metadata = {{"a", "1"}, {"a", "2"}};
  CHECK_THROWS_AS(CheckpointWriter(folder / "out", plan), InvalidArgument);
  plan.metadata = {{"_quantization_metadata", "{}"}};
  CHECK_THROWS_AS(CheckpointWriter(folder / "out", plan), InvalidArgument);
  CHECK(folder.files() == 0);
}

namespace {

constexpr const char* kMarker =
    R"({"format": "mxfp8", "group_size": 32, "orig_dtype": "torch.bfloat16", "orig_shape": [5, 40]})";

// A file with layer "l" [5, 40]: codes [32, 64], scales [128, 4].
struct LayerFile {
  std::string weight_dtype = "F8_E4M3", scale_dtype = "U8";
  std::vector<std::int64_t> weight_shape{32, 64}, scale_shape{128, 4};
  std::string marker = kMarker, metadata, prefix;
  bool has_scales = true;

  void save_to(const std::filesystem::path& path) const {
    CheckpointPlan plan;
    const std::string layer = prefix + "l";
    const auto bytes_of = [](const std::vector<std::int64_t>& shape) {
      std::size_t bytes = 1;
      for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
      return bytes;
    };
    plan.add_tensor(layer + ".weight", {weight_dtype, weight_shape});
    if (has_scales) plan.add_tensor(layer + ".weight_scale", {scale_dtype, scale_shape});
    if (!marker.empty()) {
      plan.add_tensor(layer + ".comfy_quant", {"U8", {static_cast<std::int64_t>(marker.size())}});
    }
    plan.add_tensor(layer + ".bias", {"U8", {5}});
    const std::string key = "_quantization_metadat_";
    if (!metadata.empty()) plan.metadata = {{key, metadata}};
    {
      CheckpointWriter writer(path, plan, true);
      const auto fill = [&](const std::string& name, char value, std::size_t bytes) {
        const std::string data(bytes, value);
        writer.write(name, data.data(), bytes);
      };
      fill(layer + ".weight", 'c', bytes_of(weight_shape));
      if (has_scales) fill(layer + ".weight_scale", 's', bytes_of(scale_shape));
      if (!marker.empty()) writer.write(layer + ".comfy_quant", marker.data(), marker.size());
      fill(layer + ".bias", 'b', 5);
      writer.finish();
    }
    // The writer keeps the real key to itself.
    std::string content = content_of(path);
    const std::size_t at = content.find(key);
    if (at != content.npos) content[at + key.size() - 1] = 'a';
    save(path, content);
  }
};

}  // namespace

TEST_CASE("a layer is found by its marker, by the header, or by both") {
  const Folder folder;
  const std::string listed = std::string(R"({"layers": {"l": )") + kMarker + "}}";
  LayerFile by_marker, by_header, by_both, in_prefix, unpadded;
  by_header.marker = "";
  by_header.metadata = by_both.metadata = listed;
  by_both.scale_dtype = "F8_E8M0";
  in_prefix.prefix = "model.";
  in_prefix.metadata = listed;
  unpadded.marker = R"({"format": "mxfp8", "full_precision_matrix_mult": true})";
  for (const LayerFile* file : {&by_marker, &by_header, &by_both, &in_prefix, &unpadded}) {
    file->save_to(folder / "file");
    const Checkpoint checkpoint(folder / "file");
    const MXFP8Layers layers = checkpoint.layers(file->prefix);
    REQUIRE(layers.size() == 1);
    const auto& [name, layer] = *layers.begin();
    CHECK(name == file->prefix + "l");
    CHECK(layer.weight.rows == (file == &unpadded ? 32 : 5));
    CHECK(layer.weight.cols == (file == &unpadded ? 64 : 40));
    CHECK(layer.full_precision == (file == &unpadded));
    CHECK(layer.weight.codes[0] == 'c');
    CHECK(layer.weight.scales[0] == 's');
    CHECK(layer.bias == &checkpoint.tensor(file->prefix + "l.bias"));
    CHECK(checkpoint.layers("other.").empty());
  }
}

TEST_CASE("a layer that breaks the contract is refused in a sentence about its tensor") {
  const Folder folder;
  const struct {
    void (*change)(LayerFile&);
    const char* problem;
  } cases[] = {
      {[](LayerFile& f) { f.marker = ""; }, "\"l.comfy_quant\" is missing"},
      {[](LayerFile& f) { f.marker = "{"; }, "\"l.comfy_quant\" is not JSON"},
      {[](LayerFile& f) { f.marker = "[]"; }, "\"l.comfy_quant\" is not a JSON object"},
      {[](LayerFile& f) { f.marker = std::string(5000, ' '); }, "not a short list of U8"},
      {[](LayerFile& f) { f.marker = R"({"format": "nvfp4"})"; }, "the format \"nvfp4\""},
      {[](LayerFile& f) { f.marker = "{}"; }, "the format \"\""},
      {[](LayerFile& f) { f.has_scales = false; }, "\"l.weight_scale\" is missing"},
      {[](LayerFile& f) { f.scale_dtype = "I8"; }, "\"l.weight_scale\" is I8"},
      {[](LayerFile& f) { f.scale_shape = {4, 128}; }, "the blocked scales are [128, 4]"},
      {[](LayerFile& f) { f.weight_dtype = "F8_E5M2"; }, "\"l.weight\" is F8_E5M2"},
      {[](LayerFile& f) { f.weight_shape = {2048}; }, "not a F8_E4M3 matrix"},
      {[](LayerFile& f) { f.weight_shape = {64, 32}; }, "[5, 40] padded to 32 is [32, 64]"},
      {[](LayerFile& f) { f.marker = R"({"format": "mxfp8"})", f.weight_shape = {30, 64}; },
       "not padded to multiples of 32"},
      {[](LayerFile& f) { f.metadata = "[]"; }, "\"_quantization_metadata\" is not {\"layers\""},
      {[](LayerFile& f) { f.metadata = R"({"layers": {"l": 1}})"; }, "an entry \"l\""},
      {[](LayerFile& f) { f.metadata = R"({"layers": {"k": {"format": "mxfp8"}}})"; },
       "\"k.weight\" is missing"},
      {[](LayerFile& f) {
         f.metadata = R"({"layers": {"l": {"format": "mxfp8", "full_precision_matrix_mult": 1}}})";
       },
       "disagrees about layer \"l\""},
  };
  for (const auto& one : cases) {
    LayerFile file;
    one.change(file);
    file.save_to(folder / "file");
    const Checkpoint checkpoint(folder / "file");
    const std::string error = error_of([&] { checkpoint.layers(); });
    CHECK(has(error, one.problem));
    CHECK(has(error, "file: \""));
  }
}

TEST_CASE("a planned layer is read back, with the marker of the contract") {
  const Folder folder;
  const std::int64_t rows = 5, cols = 40;
  const std::vector<float> matrix(static_cast<std::size_t>(rows * cols), 1.5f);
  const MXFP8Shape shape{rows, cols};
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.code_bytes())),
      scales(static_cast<std::size_t>(shape.scale_bytes()));
  quantize(ConstMatrixView{matrix.data(), DType::kFloat32, rows, cols, cols},
           MXFP8View{codes.data(), scales.data(), rows, cols});
  CheckpointPlan plan;
  plan.add_layer("l", rows, cols);
  plan.add_layer("\xC3\xA9", rows, cols, true);
  CheckpointWriter writer(folder / "out", plan);
  for (const std::string name : {"l", "\xC3\xA9"}) {
    writer.write(name + ".weight", codes.data(), codes.size());
    writer.write(name + ".weight_scale", scales.data(), scales.size());
  }
  writer.finish();
  const Checkpoint checkpoint(folder / "out");
  const CheckpointTensor& marker = checkpoint.tensor("l.comfy_quant");
  CHECK(std::string(static_cast<const char*>(marker.data), marker.shape[0]) == kMarker);
  const std::string full =
      std::string(kMarker, std::strlen(kMarker) - 1) + R"(, "full_precision_matrix_mult": true})";
  CHECK(checkpoint.metadata() ==
        Metadata{{"_quantization_metadata",
                  std::string(R"({"format_version": "1.0", "layers": {"l": )") + kMarker +
                      R"(, "\u00e9": )" + full + "}}"}});
  const MXFP8Layers layers = checkpoint.layers();
  REQUIRE(layers.size() == 2);
  CHECK(layers.at("\xC3\xA9").full_precision);
  std::vector<float> decoded(matrix.size());
  dequantize(layers.at("l").weight, MatrixView{decoded.data(), DType::kFloat32, rows, cols, cols});
  CHECK(decoded == matrix);
}
