"""Write or check `python/zimage_mxfp8/_core.pyi`, the types of the compiled module.

    python .ci/core_stub.py           # write it; needs ruff
    python .ci/core_stub.py --check   # fail if it is outdated

pybind11 writes the signatures at the head of docstrings. Types that it cannot know are
added here: arrays are anything with the buffer protocol or DLPack, and dtypes are names.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from zimage_mxfp8 import _core

STUB = Path(__file__).parent.parent / "python/zimage_mxfp8/_core.pyi"
HEAD = '''"""Types of the compiled module, written by .ci/core_stub.py from its docstrings."""

from typing import Any

from .dtypes import DTypeName

__version__: str

'''
_TYPES = (
    (r"\bzimage_mxfp8\._core\.", ""),
    (r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int"),
    (r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float"),
    (r"\bobject\b", "Any"),
    (r"\btuple\b(?!\[)", "tuple[Any, ...]"),
    (r"\b(\w*dtype): str", r"\1: DTypeName"),
    (r"self: \w+", "self"),
)


def _definition(name: str, docstring: str, indent: str = "") -> str:
    signature, _, text = docstring.strip().partition("\n")
    signature = signature[signature.index("(") :]
    for pattern, replacement in _TYPES:
        signature = re.sub(pattern, replacement, signature)
    body = f'\n{indent}    """{text.strip()}"""\n' if text.strip() else " ...\n"
    return f"{indent}def {name}{signature}:{body}"


def _class(name: str, cls: type) -> str:
    lines = [f"class {name}:\n"]
    if cls.__doc__:
        lines.append(f'    """{cls.__doc__.strip()}"""\n\n')
    for member, value in vars(cls).items():
        if isinstance(value, property):
            getter = value.fget.__doc__ or ""
            signature = f"{getter.strip()}\n{value.__doc__ or ''}"
            lines.append("    @property\n" + _definition(member, signature, "    "))
        elif str(value.__doc__).startswith(f"{member}("):
            lines.append(_definition(member, str(value.__doc__), "    "))
    return "".join(lines) + "\n"


def stub(module: Any = _core) -> str:
    """Return the text of the stub, before ruff formats it."""
    parts = [HEAD]
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        make = _class if inspect.isclass(value) else lambda name, f: _definition(name, f.__doc__)
        parts.append(make(name, value))
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        # Compared as syntax trees, which formatting leaves alone.
        same = ast.dump(ast.parse(stub())) == ast.dump(ast.parse(STUB.read_text()))
        sys.exit(0 if same else f"{STUB.name} is out of date: run python .ci/core_stub.py")
    STUB.write_text(stub())
    subprocess.run(["ruff", "format", "--quiet", STUB], check=True)


if __name__ == "__main__":
    main()
