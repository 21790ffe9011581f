#include <doctest/doctest.h>

#include <string>

#include "checkpoint/json.h"

using namespace zimage_mxfp8::detail;

namespace {

std::string error_of(const std::string& text) {
  try {
    parse_json(text);
  } catch (const JsonError& error) {
    return error.what();
  }
  return "";
}

std::string string_in(const std::string& text) {
  const JsonValue value = parse_json(text);
  const auto* found = value.get<std::string>();
  REQUIRE(found != nullptr);
  return *found;
}

}  // namespace

TEST_CASE("JSON that RFC 8259 allows is read") {
  for (const char* text :
       {"{}", "[]", " \t\r\n[ ] ", "null", "true", "false", "0", "-0", "12", "-3.5e+10", "1E2",
        "0.0", R"({"a": {"b": [1, "c", null]}, "": 1})", R"("\"\\\/\b\f\n\r\t\u00e9")"}) {
    CAPTURE(text);
    CHECK(error_of(text) == "");
  }
}

TEST_CASE("everything else is an error with its place") {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[",
                           "]",
                           "[1,]",
                           "[,1]",
                           "[1 2]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":1,}",
                           "{a:1}",
                           "{1:1}",
                           "{\"a\":1 \"b\":2}",
                           "01",
                           "+1",
                           "1.",
                           ".5",
                           "1e",
                           "-",
                           "0x10",
                           "NaN",
                           "Infinity",
                           "-Infinity",
                           "nul",
                           "True",
                           "'a'",
                           "\"a",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u12g4\"",
                           "\"\n\"",
                           "[] []",
                           "{} // a",
                           "\xEF\xBB\xBF{}",
                           "\"\xFF\"",
                           "\"\xC0\x80\"",
                           "\"\xED\xA0\x80\"",
                           "\"\xF4\x90\x80\x80\"",
                           "\"\xE2\x82\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\ud800\\ud800\""}) {
    CAPTURE(text);
    CHECK(error_of(text).find("byte ") == 0);
  }
  CHECK(error_of("[1, 2 3]") == "byte 6: expected ']'");
  CHECK(error_of(std::string("[0\0]", 4)).find("byte 2") == 0);
}

TEST_CASE("nesting has a limit, and the limit is exact") {
  const auto nested = [](std::size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  CHECK(error_of(nested(100)) == "");
  CHECK(error_of(nested(101)) == "byte 100: nested too deeply");
  CHECK(error_of(std::string(1 << 20, '[')) == "byte 100: nested too deeply");
}

TEST_CASE("a name that occurs twice is an error, also if it is spelled differently") {
  CHECK_THROWS_AS(parse_json(R"({"a": 1, "b": 2, "a": 3})"), JsonDuplicate);
  CHECK_THROWS_AS(parse_json(R"([{"é": 1, "\u00e9": 2}])"), JsonDuplicate);
  CHECK(error_of(R"([{"a": 1}, {"a": 1}])") == "");
}

TEST_CASE("texts are UTF-8, from escapes too") {
  CHECK(string_in(R"("\u0041\u00e9\u20ac\ud83d\ude00")") ==
        "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
  CHECK(string_in("\"\xF0\x9F\x98\x80\"") == "\xF0\x9F\x98\x80");
  CHECK(string_in(R"("\u0000")") == std::string(1, '\0'));
}

TEST_CASE("integers are read if they fit") {
  const auto integer = [](const char* text) {
    const JsonValue value = parse_json(text);
    REQUIRE(value.get<JsonNumber>() != nullptr);
    return value.get<JsonNumber>()->integer;
  };
  CHECK(integer("9223372036854775807") == 9223372036854775807);
  CHECK(integer("-5") == -5);
  CHECK_FALSE(integer("9223372036854775808").has_value());
  CHECK_FALSE(integer("1.0").has_value());
  CHECK_FALSE(integer("1e2").has_value());
}

TEST_CASE("quoted texts are read back, and in ASCII have no other bytes") {
  std::string text = "\"\\/\b\f\n\r\t\x01\x7F A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";
  text += '\0';
  CHECK(string_in(quote_json(text)) == text);
  const std::string ascii = quote_json_in_ascii(text);
  CHECK(string_in(ascii) == text);
  for (const char c : ascii) CHECK((c >= ' ' && c < 0x7F));
}
