"""The recipe a command runs with: a file, with what options say on top of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blockscale.cli import options

if TYPE_CHECKING:
    from blockscale.checkpoint.recipe import Recipe


def build_recipe(
    file: str | None,
    scale_fmt: options.ScaleFmtChoice | None,
    block_size: str | None,
    layout: options.LayoutChoice | None,
    include: list[str] | None,
    exclude: list[str] | None,
    precision: list[str] | None,
) -> Recipe:
    """Read the recipe file, if there is one; an option that was given replaces the file's entry."""
    from blockscale.checkpoint.precision import parse_precision
    from blockscale.checkpoint.recipe import Recipe, read_recipe

    given: dict[str, Any] = {
        "scale_fmt": scale_fmt and scale_fmt.value,
        "block_size": block_size,
        "layout": layout and layout.value,
        "include": include and tuple(include),
        "exclude": exclude and tuple(exclude),
        "precision": precision and parse_precision(precision),
    }
    recipe = read_recipe(file) if file else Recipe()
    return replace(recipe, **{name: value for name, value in given.items() if value})
