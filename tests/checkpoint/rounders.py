"""A rounder for tests: codes are those of the reference, but some are one step away from nearest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from blockscale import reference
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.rounded import QuantizedFormat, scale_of_rounded
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.reference.packing import pack, unpack
from tests import data

Pair = tuple[torch.Tensor, torch.Tensor]


def stepped(weight: torch.Tensor, fmt: QuantizedFormat, every: int = 7) -> Pair:
    """Codes and scales of the reference; of every so many codes one is a step further from zero."""
    if not isinstance(fmt, BlockFP8):
        packed, scale = reference.quantize_group(weight, fmt)
        fields = unpack(packed, fmt.bits, weight.shape[-1]).contiguous()
        some = fields.view(-1)[::every]
        some += (some < 2).to(torch.uint8)  # 0 or 1, of any of the formats
        return pack(fields, fmt.bits), scale
    codes, scale = reference.quantize_weight(weight, fmt.block_size, fmt.scale_fmt)
    bits = codes.view(torch.uint8).view(-1)
    bits[::every] += ((bits[::every] & 0x7F) < 0x7E).to(torch.uint8)  # 0x7E is 448, the next one NaN
    return codes, scale


@dataclass
class StepUp:
    """Rounds the weights of a local folder that it wants, a file each, and notes what it was asked and did.

    Attributes:
        source: the folder.
        wants: which names it rounds.
        spoil: changes the tensors of a file before they are written.
        before: called with the name before each weight is rounded; may raise.
        every: see `stepped`; it is the only setting.
    """

    source: Path
    wants: Callable[[str], bool] = lambda name: True
    spoil: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None
    before: Callable[[str], object] = lambda name: None
    every: int = 7
    asked: dict[str, QuantizedFormat] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        return {"every": self.every}

    def run(
        self, weights: Mapping[str, QuantizedFormat], scale_fmt: ScaleFmt, folder: Path, progress: Progress
    ) -> None:
        self.asked = dict(weights)
        wanted = [name for name in sorted(weights) if self.wants(name)]
        todo = [name for name in wanted if not (folder / f"{name}.safetensors").exists()]
        progress.start(0, len(todo))
        for name in todo:
            self.before(name)
            codes, scale = stepped(self._read(name), weights[name], self.every)
            tensors = {name: codes, scale_of_rounded(name, weights[name]): scale}
            self.spoil(tensors)
            (folder / ".tmp").mkdir(exist_ok=True)
            save_file(tensors, folder / ".tmp" / "file")
            os.replace(folder / ".tmp" / "file", folder / f"{name}.safetensors")
            self.rounded.append(name)
            progress.advance(0, 1)

    def _read(self, name: str) -> torch.Tensor:
        return data.read(self.source)[name]
