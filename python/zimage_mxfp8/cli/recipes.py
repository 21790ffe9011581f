"""`zimage-mxfp8 recipes`."""

from __future__ import annotations

import argparse

from .arguments import add_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "recipes",
        help=line,
        description="Show the built-in recipes, or the named ones (also TOML files).",
    )
    parser.set_defaults(run=run)
    parser.add_argument("recipe", nargs="*", metavar="NAME|FILE")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..conversion.recipes import DEFAULT, builtin_names, load_recipe
    from . import display

    recipes = [load_recipe(name) for name in arguments.recipe or builtin_names()]
    if arguments.json:
        display.print_json(
            [
                {
                    "name": recipe.name,
                    "title": recipe.title,
                    "description": recipe.description,
                    "keep": [
                        {"name": r.name, "pattern": r.pattern.pattern, "reason": r.reason}
                        for r in recipe.keep
                    ],
                }
                for recipe in recipes
            ]
        )
        return 0
    screen = display.screen()
    for recipe in recipes:
        default = " (the default)" if recipe.name == DEFAULT else ""
        screen.text(f"{recipe.name}{default}: {recipe.title}", style="bold")
        if recipe.description:
            screen.text(recipe.description)
        # Not a table: patterns are longer than a terminal is wide, and users copy them.
        for rule in recipe.keep:
            screen.text(f"  {rule.name}: {rule.reason}", indent=" " * 4)
            screen.line(f"    {rule.pattern.pattern}")
        screen.line()
    return 0
