// Scalar MXFP8 from the specification, by search over all E4M3 values in binary64. Shares no code
// and no method with the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

inline double e4m3(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return std::nan("");
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 0x80 ? -size : size;
}

struct Block {
  int byte;
  std::vector<int> codes;
};

inline Block encode(const std::vector<double>& values) {
  double amax = 0;
  for (const double v : values) amax = std::fmax(amax, std::fabs(v));
  Block block{0, std::vector<int>(values.size(), 0)};
  if (amax < std::ldexp(448, -127)) return block;
  while (amax > std::ldexp(448, block.byte - 127)) ++block.byte;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double scaled = std::ldexp(std::fabs(values[i]), 127 - block.byte);
    int best = 0;
    for (int code = 1; code < 0x7F; ++code) {
      const double better = std::fabs(e4m3(best) - scaled) - std::fabs(e4m3(code) - scaled);
      if (better > 0 || (better == 0 && code % 2 == 0)) best = code;
    }
    block.codes[i] = best | (std::signbit(values[i]) ? 0x80 : 0);
  }
  return block;
}

}  // namespace reference
