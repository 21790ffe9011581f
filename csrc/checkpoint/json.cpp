#include "checkpoint/json.h"

#include <limits>
#include <unordered_set>

namespace zimage_mxfp8::detail {
namespace {

constexpr int kMaxDepth = 100;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& text, std::uint32_t point) {
  const auto append = [&](std::uint32_t byte) { text += static_cast<char>(byte); };
  if (point < 0x80) {
    append(point);
  } else if (point < 0x800) {
    append(0xC0 | point >> 6);
    append(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    append(0xE0 | point >> 12);
    append(0x80 | (point >> 6 & 0x3F));
    append(0x80 | (point & 0x3F));
  } else {
    append(0xF0 | point >> 18);
    append(0x80 | (point >> 12 & 0x3F));
    append(0x80 | (point >> 6 & 0x3F));
    append(0x80 | (point & 0x3F));
  }
}

bool is_surrogate(std::uint32_t point) { return point >= 0xD800 && point < 0xE000; }
bool is_high_surrogate(std::uint32_t point) { return point >= 0xD800 && point < 0xDC00; }

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  JsonValue parse() {
    JsonValue value = read_value(1);
    skip_space();
    if (at_ < text_.size()) fail("text after the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw JsonError("byte " + std::to_string(at_) + ": " + what);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected '") + c + "'");
  }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
      ++at_;
    }
  }

  JsonValue read_value(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    skip_space();
    switch (peek()) {
      case '{':
        return read_object(depth);
      case '[':
        return read_array(depth);
      case '"':
        return JsonValue(read_string());
      case 't':
        return read_word("true", JsonValue(true));
      case 'f':
        return read_word("false", JsonValue(false));
      case 'n':
        return read_word("null", JsonValue(nullptr));
      default:
        return read_number();
    }
  }

  JsonValue read_word(std::string_view word, JsonValue value) {
    if (text_.substr(at_, word.size()) != word) fail("expected a value");
    at_ += word.size();
    return value;
  }

  JsonValue read_object(int depth) {
    JsonObject object;
    std::unordered_set<std::string> names;
    expect('{');
    skip_space();
    if (take('}')) return JsonValue(std::move(object));
    do {
      skip_space();
      if (peek() != '"') fail("expected a name in quotes");
      std::string name = read_string();
      if (!names.insert(name).second) throw JsonDuplicate(name);
      skip_space();
      expect(':');
      JsonValue value = read_value(depth + 1);
      object.emplace_back(std::move(name), std::move(value));
      skip_space();
    } while (take(','));
    expect('}');
    return JsonValue(std::move(object));
  }

  JsonValue read_array(int depth) {
    JsonArray array;
    expect('[');
    skip_space();
    if (take(']')) return JsonValue(std::move(array));
    do {
      array.push_back(read_value(depth + 1));
      skip_space();
    } while (take(','));
    expect(']');
    return JsonValue(std::move(array));
  }

  std::string read_string() {
    std::string result;
    expect('"');
    while (!take('"')) {
      if (at_ >= text_.size()) fail("a text without end");
      if (take('\\')) {
        read_escape(result);
        continue;
      }
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character in a text");
      const std::size_t begin = at_;
      if (!next_code_point(text_, at_)) fail("not UTF-8");
      result += text_.substr(begin, at_ - begin);
    }
    return result;
  }

  void read_escape(std::string& result) {
    constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const std::size_t letter = at_ < text_.size() ? letters.find(text_[at_]) : letters.npos;
    if (letter != letters.npos) {
      ++at_;
      result += meanings[letter];
      return;
    }
    if (!take('u')) fail("an unknown escape");
    std::uint32_t point = read_hex4();
    if (is_high_surrogate(point) && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const std::uint32_t low = read_hex4();
      if (!is_surrogate(low) || is_high_surrogate(low)) fail("half a surrogate pair");
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    } else if (is_surrogate(point)) {
      fail("half a surrogate pair");
    }
    append_utf8(result, point);
  }

  std::uint32_t read_hex4() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      constexpr std::string_view digits = "0123456789abcdef";
      const char c = peek();
      const std::size_t digit = digits.find(c >= 'A' && c <= 'F' ? static_cast<char>(c + 32) : c);
      if (digit == digits.npos) fail("expected four hexadecimal digits");
      value = value << 4 | static_cast<std::uint32_t>(digit);
      ++at_;
    }
    return value;
  }

  JsonValue read_number() {
    const bool negative = take('-');
    if (!is_digit(peek())) fail("expected a value");
    std::optional<std::int64_t> integer = 0;
    bool is_zero = true;
    if (!take('0')) {
      while (is_digit(peek())) {
        const int digit = text_[at_++] - '0';
        is_zero = false;
        constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
        if (integer && *integer > (most - digit) / 10) integer.reset();
        if (integer) integer = *integer * 10 + digit;
      }
    }
    if (integer && negative) integer = -*integer;
    if (take('.')) {
      integer.reset();
      is_zero = read_digits() && is_zero;
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      integer.reset();
      if (!take('+')) take('-');
      read_digits();
    }
    return JsonValue(JsonNumber{integer, is_zero});
  }

  // Returns whether all are 0.
  bool read_digits() {
    if (!is_digit(peek())) fail("expected a digit");
    bool zeros = true;
    while (is_digit(peek())) zeros = text_[at_++] == '0' && zeros;
    return zeros;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

std::string escaped_unit(std::uint32_t unit) {
  std::string escape = "\\u";
  for (int shift = 12; shift >= 0; shift -= 4) escape += "0123456789abcdef"[unit >> shift & 15];
  return escape;
}

std::string quote(std::string_view text, bool ascii) {
  constexpr std::string_view meanings = "\"\\\b\f\n\r\t", letters = "\"\\bfnrt";
  std::string result = "\"";
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = at;
    const std::uint32_t point = next_code_point(text, at).value_or(0xFFFD);
    if (at == begin) ++at;
    const std::size_t letter =
        point < 0x80 ? meanings.find(static_cast<char>(point)) : meanings.npos;
    if (letter != meanings.npos) {
      (result += '\\') += letters[letter];
    } else if (point < 0x20 || (ascii && point > 0x7E && point < 0x10000)) {
      result += escaped_unit(point);
    } else if (ascii && point >= 0x10000) {
      result += escaped_unit(0xD800 + ((point - 0x10000) >> 10));
      result += escaped_unit(0xDC00 + ((point - 0x10000) & 0x3FF));
    } else {
      append_utf8(result, point);
    }
  }
  return result + "\"";
}

}  // namespace

std::optional<std::uint32_t> next_code_point(std::string_view text, std::size_t& position) {
  const auto byte = [&](std::size_t i) {
    return position + i < text.size() ? static_cast<unsigned char>(text[position + i]) : 0u;
  };
  const std::uint32_t first = byte(0);
  if (first < 0x80) {
    ++position;
    return first;
  }
  // The bytes of a character, and the smallest character that needs so many.
  std::size_t size = 2;
  std::uint32_t point = first & 0x1F, smallest = 0x80;
  if (first >= 0xF0 && first < 0xF8) {
    size = 4, point = first & 0x07, smallest = 0x10000;
  } else if (first >= 0xE0 && first < 0xF0) {
    size = 3, point = first & 0x0F, smallest = 0x800;
  } else if (first < 0xC0 || first >= 0xE0) {
    return std::nullopt;
  }
  for (std::size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return std::nullopt;
    point = point << 6 | (byte(i) & 0x3F);
  }
  if (point < smallest || point > 0x10FFFF || is_surrogate(point)) return std::nullopt;
  position += size;
  return point;
}

const JsonValue* find(const JsonObject& object, std::string_view name) {
  for (const auto& [key, value] : object) {
    if (key == name) return &value;
  }
  return nullptr;
}

JsonValue parse_json(std::string_view text) { return Parser(text).parse(); }

std::string quote_json(std::string_view text) { return quote(text, false); }

std::string quote_json_in_ascii(std::string_view text) { return quote(text, true); }

}  // namespace zimage_mxfp8::detail
