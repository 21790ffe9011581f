r"""Recipes: the layers that stay in the source's precision, with reasons.

A recipe is data. The built-in ones are the TOML files in this folder; users write their own:

    title = "..."                     # optional
    extends = "uniform"               # optional: a built-in recipe; its patterns come first

    [[keep]]
    name = "first blocks"
    pattern = '^layers\.[01]\.'      # Python regular expression, searched in the tensor's name
    reason = "why they stay"

Names are matched without the transformer's prefix, such as `model.diffusion_model.`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import path as path_argument
from ...errors import RecipeError, UsageError, remedy
from ...text import did_you_mean
from ...zimage.layers import ZIMAGE
from ...zimage.table import LayerTable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent
DEFAULT = "uniform"
CONTROLNET = "controlnet"  # the default for ControlNets


@dataclass(frozen=True)
class KeepRule:
    """Layers that are not quantised.

    Attributes:
        name: short title of the rule.
        pattern: regular expression, searched in tensor names.
        reason: why these layers are kept.
        full_name: whether the transformer's prefix counts as part of the name.
    """

    name: str
    pattern: re.Pattern[str]
    reason: str
    full_name: bool = False

    def matches(self, tensor_name: str, prefix: str) -> bool:
        """Return whether the rule keeps a tensor; its name starts with `prefix`."""
        name = tensor_name if self.full_name else tensor_name[len(prefix) :]
        return self.pattern.search(name) is not None


@dataclass(frozen=True)
class Recipe:
    """A named list of rules.

    Attributes:
        name: name of a built-in recipe, or the path of a file.
        title: one line.
        description: a few sentences.
        keep: the rules; the first that matches a layer gives the reason.
        source_rounding: round F16 and F32 weights to BF16 before they are quantised or kept, as
            convert_to_quant does.
    """

    name: str
    title: str
    description: str
    keep: tuple[KeepRule, ...]
    source_rounding: bool = False

    @property
    def reproduces_convert_to_quant(self) -> bool:
        """Whether files must equal convert_to_quant's byte for byte."""
        return self.source_rounding

    def excluding(self, patterns: Iterable[str]) -> Recipe:
        """Return this recipe with more patterns, searched in the tensors' full names.

        Raises:
            UsageError: a pattern is not a regular expression.
        """
        rules = []
        for pattern in patterns:
            try:
                compiled = compile_pattern(pattern)
            except ValueError as error:
                raise UsageError(
                    "exclude_layers",
                    f'"{pattern}" is not a regular expression: {error}',
                    "correct it",
                ) from None
            rules.append(KeepRule(f"excluded {pattern}", compiled, "excluded by a pattern", True))
        return Recipe(
            self.name, self.title, self.description, self.keep + tuple(rules), self.source_rounding
        )

    def with_rules_of(self, other: Recipe) -> Recipe:
        """Return a recipe with the rules of both."""
        keep = self.keep + tuple(rule for rule in other.keep if rule not in self.keep)
        rounding = self.source_rounding or other.source_rounding
        return Recipe(f"{self.name}+{other.name}", self.title, self.description, keep, rounding)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression of a recipe or an option; ValueError if it is invalid."""
    if not isinstance(pattern, str):
        raise ValueError("it is not text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about syntax that may change
        try:
            return re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None


def builtin_names() -> list[str]:
    """Return the names of the built-in recipes, the default first."""
    return sorted((path.stem for path in _FOLDER.glob("*.toml")), key=lambda n: (n != DEFAULT, n))


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """Return a built-in recipe by name, or a recipe from a TOML file by path.

    Raises:
        UsageError: no built-in recipe or file of that name, or not a name or path.
        RecipeError: the file is not a valid recipe; the sentence names the problem and its place.
    """
    path = path_argument("recipe", name_or_path)
    text = os.fspath(name_or_path)
    if text in builtin_names():
        return _read(_FOLDER / f"{text}.toml", text)
    try:
        is_file = path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from None
    if not is_file:
        if path.suffix == ".toml":
            raise UsageError("recipe", f"{path} does not exist", "check the path")
        raise UsageError(
            "recipe",
            f'"{text}" does not exist',
            f"name one of {', '.join(builtin_names())} or a TOML file"
            f"{did_you_mean([text], builtin_names())}",
        )
    return _read(path, text)


def rules_outside_blocks(table: LayerTable = ZIMAGE) -> tuple[KeepRule, ...]:
    """Return the default recipe's rules for layers outside the blocks: embedders, final layer."""
    names = [layer.weight for layer in table.outside if layer.is_matrix]
    return tuple(
        rule for rule in load_recipe(DEFAULT).keep if any(rule.matches(name, "") for name in names)
    )


def recipe_toml(recipe: Recipe) -> str:
    """Return a recipe's title, description and rules as `load_recipe` reads them."""
    lines = [f"title = {_toml_text(recipe.title)}"]
    lines += [f"description = {_toml_text(recipe.description)}"]
    for rule in recipe.keep:
        lines += ["", "[[keep]]"]
        lines += [f"name = {_toml_text(rule.name)}"]
        lines += [f"pattern = {_toml_text(rule.pattern.pattern)}"]
        lines += [f"reason = {_toml_text(rule.reason)}"]
    return "\n".join(lines) + "\n"


def _toml_text(text: str) -> str:
    """Return a TOML basic string. Its escapes are JSON's, except for the character DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _unreadable(path: Path, error: OSError) -> RecipeError:
    cause = error.strerror or str(error)
    return RecipeError(f"recipe {path} cannot be read: {cause}; {remedy(error)}")


def _read(path: Path, name: str) -> Recipe:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {path} is not TOML: byte {error.start} is not UTF-8; save it as UTF-8 text"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}; correct it") from None
    if not document:
        raise RecipeError(f"recipe {path} is empty; to keep no layer, write keep = []")
    known = {
        "title": str,
        "description": str,
        "extends": str,
        "source_rounding": str,
        "keep": list,
    }
    for key, value in document.items():
        if key not in known:
            raise RecipeError(
                f'recipe {path} has the unknown key "{key}"; a recipe has {", ".join(known)}'
            )
        if not isinstance(value, known[key]):
            raise RecipeError(f'recipe {path}: "{key}" must be a {known[key].__name__}')
    rounding = document.get("source_rounding", "")
    if rounding not in ("", "bfloat16"):
        raise RecipeError(f'recipe {path}: "source_rounding" must be "bfloat16" or left out')
    keep: tuple[KeepRule, ...] = ()
    base = None
    if "extends" in document:
        if document["extends"] not in builtin_names():
            hint = did_you_mean([document["extends"]], builtin_names())
            raise RecipeError(
                f'recipe {path} extends "{document["extends"]}", which is not one of '
                f"{', '.join(builtin_names())}{hint}"
            )
        base = load_recipe(document["extends"])
        keep = base.keep
    keep += tuple(
        _rule(path, number, entry) for number, entry in enumerate(document.get("keep", ()), 1)
    )
    return Recipe(
        name,
        document.get("title", path.stem),
        " ".join(document.get("description", "").split()),
        keep,
        bool(rounding) or (base is not None and base.source_rounding),
    )


def _rule(path: Path, number: int, entry: Any) -> KeepRule:
    where = f"recipe {path}, [[keep]] number {number}"
    if not isinstance(entry, dict) or set(entry) != {"name", "pattern", "reason"}:
        raise RecipeError(f"{where} must have exactly name, pattern and reason")
    if not all(isinstance(value, str) and value for value in entry.values()):
        raise RecipeError(f"{where}: name, pattern and reason must be text")
    try:
        pattern = compile_pattern(entry["pattern"])
    except ValueError as error:
        raise RecipeError(
            f'{where}: the pattern "{entry["pattern"]}" is not a regular expression: {error}; '
            "correct it"
        ) from None
    return KeepRule(entry["name"], pattern, entry["reason"])
