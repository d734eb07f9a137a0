"""The recipe a command runs with: a file, with what options say on top of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blockscale.cli import options

if TYPE_CHECKING:
    from blockscale.checkpoint.recipe import Recipe


_BUDGET = "budget:"
_TAKEN = ("compressed-tensors", "w4afp8")  # layouts without a place for all that a budget chooses from


def fitted(recipe: Recipe, file: str | None, src: str, revision: str | None) -> Recipe:
    """The recipe; where the file is `budget:SIZE`, with the precision of each weight that fits into the size.

    Raises:
        BlockscaleError: options that leave nothing to choose, or a size that no choice has.
    """
    if not file or not file.startswith(_BUDGET):
        return recipe
    from blockscale.errors import BlockscaleError
    from blockscale.search.budget import budget_recipe

    given = "--precision" if recipe.precision.entries else "--layout" if recipe.layout in _TAKEN else None
    if given is not None:
        raise BlockscaleError("a budget says this itself", where=given, remedy=f"leave out {given}")
    return budget_recipe(src, file.removeprefix(_BUDGET), recipe, revision)


def build_recipe(
    file: str | None,
    scale_fmt: options.ScaleFmtChoice | None,
    block_size: str | None,
    layout: options.LayoutChoice | None,
    include: list[str] | None,
    exclude: list[str] | None,
    precision: list[str] | None,
) -> Recipe:
    """Read the recipe file, if there is one; an option that was given replaces the file's entry.

    What `budget:SIZE` comes to depends on the checkpoint: see `fitted`.
    """
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
    recipe = read_recipe(file) if file and not file.startswith(_BUDGET) else Recipe()
    return replace(recipe, **{name: value for name, value in given.items() if value})
