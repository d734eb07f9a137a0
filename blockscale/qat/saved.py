"""Everything that a training goes on from, on disk as a whole or not at all.

A save is a folder `step-N` with the tensors of model and optimizer in safetensors files and a JSON file of
facts. It is written as `step-N.part` and renamed when all of it is on the disk; then the one before goes. A
kill at any moment leaves at least one that is whole. Nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blockscale.checkpoint.writer import io_errors, sync_folder
from blockscale.errors import BlockscaleError

_MODEL, _OPTIMIZER, _FACTS = "model.safetensors", "optimizer.safetensors", "facts.json"
_UNFINISHED = ".part"
_PREFIX = "step-"


@dataclass(frozen=True)
class Saved:
    """A save that is whole.

    Attributes:
        folder: of it.
        step: after which it was made.
        facts: what was given with it.
    """

    folder: Path
    step: int
    facts: dict[str, Any]

    def model(self) -> dict[str, torch.Tensor]:
        """Name -> tensor."""
        return _load(self.folder / _MODEL)

    def optimizer(self) -> dict[str, torch.Tensor]:
        """`name.exp_avg` -> tensor."""
        return _load(self.folder / _OPTIMIZER)


def save(
    folder: Path,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Save a step, and remove earlier ones.

    Raises:
        BlockscaleError: the disk is full, or cannot be written.
    """
    final = folder / f"{_PREFIX}{step}"
    unfinished = final.with_name(final.name + _UNFINISHED)
    with io_errors(unfinished):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, tensors in ((_MODEL, model), (_OPTIMIZER, optimizer)):
            on_cpu = {key: each.detach().cpu().contiguous() for key, each in tensors.items()}
            save_file(on_cpu, unfinished / name)
        (unfinished / _FACTS).write_text(json.dumps(dict(facts), indent=2))
        for each in (*unfinished.iterdir(), unfinished):  # files, too, are synced by their descriptor
            sync_folder(each)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        sync_folder(folder)
        for older in folder.glob(f"{_PREFIX}*"):
            if older != final:
                shutil.rmtree(older, ignore_errors=True)
    return final


def newest(folder: Path) -> Saved | None:
    """The last save that is whole, if there is one.

    Raises:
        BlockscaleError: it cannot be read.
    """
    steps = [
        (int(number), each)
        for each in folder.glob(f"{_PREFIX}*")
        if (number := each.name.removeprefix(_PREFIX)).isdecimal()
    ]
    if not steps:
        return None
    step, place = max(steps)
    try:
        return Saved(place, step, json.loads((place / _FACTS).read_text()))
    except (OSError, ValueError) as error:
        raise BlockscaleError("cannot be read", where=place / _FACTS, got=error) from error


def _load(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in list(opened.keys())}
