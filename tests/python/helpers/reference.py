"""Scalar MXFP8, written from the specification with Python floats and nothing else.

Python floats are binary64, in which every float32 times any power of two that occurs here is
exact. Shares no code and no method with the package: codes are found by searching the table of
all E4M3 values.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


def e4m3_magnitude(code: int) -> float:
    """Value of a code without its sign: 4 exponent bits (bias 7), 3 mantissa bits."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = [e4m3_magnitude(code) for code in range(0x7F)]  # 0x7F is NaN
assert E4M3[-1] == 448 and E4M3[1] == 2.0**-9


def encode_magnitude(value: float) -> int:
    """Nearest code; ties go to the even one; more than 448 saturates."""
    above = bisect.bisect_left(E4M3, value)
    if above == len(E4M3):
        return 0x7E
    if above == 0 or E4M3[above] == value:
        return above
    low, high = value - E4M3[above - 1], E4M3[above] - value
    if low == high:
        return above if above % 2 == 0 else above - 1
    return above if high < low else above - 1


def scale_byte(amax: float) -> int:
    """Smallest byte whose scale brings amax to 448 or less, in 0..254."""
    byte = math.frexp(amax)[1] + 127 - 12  # low enough; then up
    while amax > math.ldexp(448.0, byte - 127):
        byte += 1
    return min(max(byte, 0), 254)


def encode_block(values: Sequence[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of a block."""
    amax = max(abs(value) for value in values)
    if amax < math.ldexp(448.0, -127):
        return 0, [0] * len(values)
    byte = scale_byte(amax)
    codes = []
    for value in values:
        sign = 0x80 if math.copysign(1.0, value) < 0 else 0
        codes.append(sign | encode_magnitude(math.ldexp(abs(value), 127 - byte)))
    return byte, codes


def decode(code: int, byte: int) -> float:
    """Value of a code under a scale."""
    if code & 0x7F == 0x7F or byte == 255:
        return math.nan
    return math.copysign(math.ldexp(E4M3[code & 0x7F], byte - 127), -1.0 if code & 0x80 else 1.0)


def scale_position(row: int, block: int, blocks: int) -> int:
    """Byte offset in the 128x4 layout, by walking: tile, then row within it, then column."""
    tile = (row // 128) * math.ceil(blocks / 4) + block // 4
    inner_row = row % 128
    # A tile is 32 lines of 16 bytes; a line holds rows r, r+32, r+64, r+96, four scales each.
    line, part = inner_row % 32, inner_row // 32
    return tile * 32 * 16 + line * 16 + part * 4 + block % 4
