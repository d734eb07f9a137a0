"""How a parameter of a model of transformers is stored in the checkpoint that it is read from."""

from __future__ import annotations

from dataclasses import dataclass

from blockscale.checkpoint.group_storage import GroupStorage, group_storage
from blockscale.formats import Layout, scale_name
from blockscale.group_spelling import WrittenFormat


@dataclass(frozen=True)
class Stored:
    """How a parameter is stored.

    Attributes:
        parts: how many matrices lie in it one below the other, each with blocks of its own: 2 where a
            checkpoint has gate and up apart, since no block reaches across two tensors.
        group: the format of a weight of fewer than 8 bits; None of an FP8 one.
        layout: of the checkpoint that it is read from.
    """

    parts: int = 1
    group: WrittenFormat | None = None
    layout: Layout = "blockscale"

    @property
    def storage(self) -> GroupStorage | None:
        """How the checkpoint has it, if it has fewer than 8 bits."""
        return None if self.group is None else group_storage(self.layout, self.group)

    def scale_name(self, name: str) -> str:
        """Name of the scale of a parameter `name` that is stored so."""
        storage = self.storage
        return scale_name(name, self.layout) if storage is None else name + storage.scale
