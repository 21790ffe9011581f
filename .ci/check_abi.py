"""Check that the public interface of the C++ library is the one that the list says.

    python .ci/check_abi.py LIBRARY            # such as build/csrc/libzimage_mxfp8.a
    python .ci/check_abi.py LIBRARY --renew    # write the list, for a change that is meant

The list, csrc/public_interface.txt, has every type and constant that a public header declares, and
every function outside of namespace `detail` that the library exports. For Linux with binutils.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "csrc" / "include" / "zimage_mxfp8"
LIST = ROOT / "csrc" / "public_interface.txt"
NAMESPACE = "zimage_mxfp8::"
# Names that the demangler spells out.
SPELLINGS = (
    (
        r"std::(__cxx11::)?basic_string<char, std::char_traits<char>, std::allocator<char> ?>",
        "std::string",
    ),
    (r"std::filesystem::__cxx11::path", "std::filesystem::path"),
    (r", std::less<std::string ?>", ""),
    (r", std::allocator<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*> ?>", ">"),
    (r"\bunsigned char\b", "std::uint8_t"),
    (r"\bunsigned long\b", "std::size_t"),
    (r"\blong\b", "std::int64_t"),
    (r" >", ">"),
    (NAMESPACE, ""),
    (r"\[abi:cxx11\]", ""),
)


def declarations(text: str) -> Iterator[str]:
    """Return the declarations of a header, a namespace or a class, each on one line."""
    declaration, depth = "", 0
    for char in text:
        declaration += char
        depth += (char in "{(") - (char in ")}")
        is_body_of_function = char == "}" and "(" in declaration.partition("{")[0]
        if depth == 0 and (char == ";" or is_body_of_function):
            if (line := " ".join(declaration.split())) not in (";", ""):
                yield line
            declaration = ""


def without_comments(header: str) -> str:
    """Return what is between the braces of the header's namespace."""
    lines = (line for line in header.splitlines() if not line.startswith("#"))
    code = re.sub(r"//[^\n]*", "", "\n".join(lines))
    return code.partition("namespace zimage_mxfp8 {")[2].rpartition("}")[0]


def types_and_constants(header: str) -> Iterator[str]:
    """Return what a header declares besides functions, members on lines of their own."""
    for line in declarations(without_comments(header)):
        head, brace, rest = line.partition("{")
        if "(" in head and not brace and not head.startswith(("using", "inline constexpr")):
            continue
        if not re.match(r"(struct|class) [^(=]*$", head) or not brace:
            yield line
            continue
        yield head + "{"
        for member in declarations(rest.rpartition("}")[0]):
            yield "  " + member
        yield "}"


def functions(library: Path) -> set[str]:
    """Return the functions that a library exports outside of namespace `detail`."""
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(library)]
    found = set()
    for line in subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines():
        parts = line.split(" ", 2)
        if len(parts) != 3 or parts[1] not in "TBDR" or not parts[2].startswith(NAMESPACE):
            continue
        name = parts[2].removeprefix(NAMESPACE)
        if not name.startswith("detail::"):
            for spelling, short in SPELLINGS:
                name = re.sub(spelling, short, name)
            found.add(name)
    return found


def interface(headers: Path, exported: set[str]) -> str:
    """Return the text of the list.

    Raises:
        SystemExit: the library exports a function that no header declares.
    """
    lines, code = [], ""
    for path in sorted(headers.glob("*.h")):
        text = path.read_text("utf-8")
        code += without_comments(text)
        if found := list(types_and_constants(text)):
            lines += [f"# {path.name}", *found, ""]
    hidden = [name for name in sorted(exported) if not is_declared(name, code)]
    if hidden:
        sys.exit(
            "the library exports functions that no public header declares; move them to namespace "
            "detail or an unnamed one:\n" + "\n".join(hidden)
        )
    return "\n".join([*lines, "# functions", *sorted(exported), ""])


def is_declared(function: str, code: str) -> bool:
    """Return whether a header has the name of a function."""
    name = re.split(r"[(\[]", function, maxsplit=1)[0].rpartition("::")[2]
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code) is not None


def main() -> None:
    """Compare the list, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--renew", action="store_true", help="write the list")
    arguments = parser.parse_args()
    found = interface(HEADERS, functions(arguments.library))
    if arguments.renew:
        LIST.write_text(found, "utf-8")
        return
    listed = LIST.read_text("utf-8") if LIST.exists() else ""
    difference = list(
        difflib.unified_diff(
            listed.splitlines(), found.splitlines(), "listed", "found", n=1, lineterm=""
        )
    )
    if difference:
        sys.exit(
            "\n".join(difference)
            + "\n\nthe public interface changed. If that is meant, say so in CHANGELOG.md and run "
            f"`python .ci/check_abi.py {arguments.library} --renew`"
        )
    print(f"the public interface is as listed: {len(found.splitlines())} lines")


if __name__ == "__main__":
    main()
