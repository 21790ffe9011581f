// JSON as safetensors headers and markers hold it (RFC 8259), without extensions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace zimage_mxfp8::detail {

class JsonValue;

// Members in the order of the text; no name occurs twice.
using JsonObject = std::vector<std::pair<std::string, JsonValue>>;
using JsonArray = std::vector<JsonValue>;

struct JsonNumber {
  // The value, if it is written as an integer and fits.
  std::optional<std::int64_t> integer;
  bool is_zero;
};

// Texts are UTF-8.
class JsonValue {
 public:
  using Content =
      std::variant<std::nullptr_t, bool, JsonNumber, std::string, JsonArray, JsonObject>;

  explicit JsonValue(Content content) : content_(std::move(content)) {}

  // The content if it is of this type, or null.
  template <typename Type>
  const Type* get() const {
    return std::get_if<Type>(&content_);
  }
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(content_); }

 private:
  Content content_;
};

// The member of that name, or null.
const JsonValue* find(const JsonObject& object, std::string_view name);

// What is wrong with a text; a clause such as `byte 12: expected ":"`.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A name that occurs twice in an object.
class JsonDuplicate : public JsonError {
 public:
  explicit JsonDuplicate(std::string name)
      : JsonError("\"" + name + "\" occurs twice"), name_(std::move(name)) {}
  const std::string& name() const noexcept { return name_; }

 private:
  std::string name_;
};

// Throws JsonError for text that is not JSON or not UTF-8, has half a surrogate pair or is nested
// deeper than 100 levels, and JsonDuplicate.
JsonValue parse_json(std::string_view text);

// A text in quotes, as UTF-8, or in ASCII with \u for all other characters. The text is UTF-8.
std::string quote_json(std::string_view text);
std::string quote_json_in_ascii(std::string_view text);

// The code point at `position` of a text, whose bytes are skipped; nullopt if they are not UTF-8.
std::optional<std::uint32_t> next_code_point(std::string_view text, std::size_t& position);

}  // namespace zimage_mxfp8::detail
