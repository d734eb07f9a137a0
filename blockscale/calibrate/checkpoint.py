"""Calibrated rounding for `quantize_checkpoint`: weights of a checkpoint, rounded decoder layer by layer.

What a layer's weights became is written before the next layer begins. A run that was interrupted reads
finished layers back: they only pass both streams on. Weights outside the decoder layers, and such as no
module of the model multiplies with, are left to plain rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from blockscale import ops
from blockscale.calibrate.layerwise import Place, Roundings, round_layer
from blockscale.calibrate.rounding import Rounding, Search
from blockscale.calibrate.stations import Chunk, Wanted, decoder_layers, first_chunks
from blockscale.calibrate.text import Calibration, save_whole
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import BlockFP8, scale_name
from blockscale.huggingface.load import load_as_stored
from blockscale.huggingface.modules import takes_fp8
from blockscale.huggingface.targets import Target, find_targets

_ROWS = 8  # sequences that go through a layer at a time


class CalibratedRounder:
    """Rounds the weights of a checkpoint so that the outputs of its layers stay as they were."""

    def __init__(
        self, source: Source, calibration: Calibration, device: str = "cpu", search: Search | None = None
    ) -> None:
        """See the module.

        Args:
            source: unquantized checkpoint of an architecture that transformers knows.
            calibration: the text.
            device: where a layer is run and rounded; the rest of the model stays on the host.
            search: of the rounding.
        """
        self._source, self._calibration, self._device = source, calibration, device
        self._search = search or Search()

    def settings(self) -> dict[str, Any]:
        """The text and the search."""
        search = self._search
        return {
            **self._calibration.settings(),
            "damping": search.damping,
            "share": search.share,
            "factors": search.factors,
            "sweeps": search.sweeps,
        }

    def run(self, weights: Mapping[str, BlockFP8], folder: Path, progress: Progress) -> None:
        """Write codes and scales of these weights into the folder, a file for every decoder layer.

        Raises:
            BlockscaleError: an architecture that transformers does not know or that has no decoder layers, or
                fewer calibration tokens than a layer has inputs.
            NonFiniteError: a weight holds NaN or Inf; nobody looks at it again.
        """
        model = load_as_stored(self._source)
        layers, prefix = decoder_layers(model)
        targets = _targets_of_layers(model, self._source, weights, prefix)
        _check_tokens(model, prefix, targets, self._calibration.tokens)
        for number, mine in targets.items():
            _refuse_nonfinite(layers[number], mine)
        progress.start(_bytes(model, prefix, targets), sum(map(len, targets.values())))
        chunks = self._chunks(model, layers, folder)
        for number in range(len(layers)):
            layer, layers[number] = layers[number], nn.Identity()  # its memory goes with it
            mine = targets.get(number, {})
            wanted = {name: Wanted(weights[each.sources[0]], each.parts) for name, each in mine.items()}
            file = folder / f"layer-{number:05d}.safetensors"
            known = _read(file, mine) if file.exists() else None
            found = round_layer(layer.to(self._device).float(), chunks, wanted, self._search, known)
            if known is None and found:
                _write(file, found, mine)
            progress.advance(_layer_bytes(layer, mine), len(mine))

    def _chunks(self, model: nn.Module, layers: nn.ModuleList, folder: Path) -> list[Chunk]:
        """Both streams before the first layer."""
        ids = self._calibration.token_ids(model, folder / ".tokens.safetensors", self._device)
        whole = list(layers)
        for number in range(len(layers)):
            layers[number] = nn.Identity()
        model.float()  # all but the layers, each of which is when its turn comes
        for number, layer in enumerate(whole):
            layers[number] = layer
        return first_chunks(model, layers, ids, _ROWS)


def _targets_of_layers(
    model: nn.Module, source: Source, weights: Mapping[str, BlockFP8], prefix: str
) -> dict[int, dict[str, Target]]:
    """Decoder layer -> path of a parameter in it -> what it is made of, of parameters that can be rounded."""
    found: dict[int, dict[str, Target]] = {}
    for target in find_targets(model, signatures(read_index(source)), weights.keys()):
        if target.name.startswith(f"{prefix}.") and takes_fp8(model.get_submodule(target.path), target.leaf):
            number, _, name = target.name.removeprefix(f"{prefix}.").partition(".")
            found.setdefault(int(number), {})[name] = target
    return found


def _check_tokens(
    model: nn.Module, prefix: str, targets: Mapping[int, Mapping[str, Target]], tokens: int
) -> None:
    """Refuse too few tokens before anything is rounded; experts that see too few are rounded plainly."""
    widths = {
        target.name: model.get_parameter(target.name).shape[-1]
        for mine in targets.values()
        for target in mine.values()
        if target.leaf == "weight"
    }
    name = max(widths, key=lambda each: widths[each], default=None)
    if name is not None and tokens < widths[name]:
        raise BlockscaleError(
            "too few calibration tokens",
            where=name,
            expected=f"at least {widths[name]}, one for every input of the layer",
            got=tokens,
            remedy="more with --calibration-tokens",
        )


def _refuse_nonfinite(layer: nn.Module, targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        parameter = layer.get_parameter(name)
        count, first = ops.find_nonfinite(parameter.detach())
        if count:
            # Of merged experts, the position is that in the merged weight.
            where = target.sources[0] if len(target.sources) == 1 else target.name
            position = tuple(int(each) for each in torch.unravel_index(torch.tensor(first), parameter.shape))
            raise NonFiniteError(count, position, where=where)


def _bytes(model: nn.Module, prefix: str, targets: Mapping[int, Mapping[str, Target]]) -> int:
    return sum(
        _layer_bytes(model.get_submodule(f"{prefix}.{number}"), mine) for number, mine in targets.items()
    )


def _layer_bytes(layer: nn.Module, targets: Mapping[str, Target]) -> int:
    """Values of the weights that are rounded, which is the bytes of their codes."""
    return sum(layer.get_parameter(name).numel() for name in targets)


def _write(file: Path, found: Roundings, targets: Mapping[str, Target]) -> None:
    """Codes and scales under the names of the checkpoint; all of them or no file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, target in targets.items():
        places = [place for place in found if place.parameter == name]
        merged = len(target.sources) < len(places)  # one tensor holds all experts
        if merged:
            (source,) = target.sources
            tensors[source] = torch.stack([found[place].codes for place in places]).cpu()
            tensors[scale_name(source)] = torch.stack([found[place].scale for place in places]).cpu()
            continue
        for place, source in zip(places, target.sources if places else (), strict=True):
            tensors[source] = found[place].codes.cpu().contiguous()
            tensors[scale_name(source)] = found[place].scale.cpu().contiguous()
    save_whole(tensors, file)


def _read(file: Path, targets: Mapping[str, Target]) -> Roundings:
    """What `_write` has written."""
    tensors = load_file(file)
    found: Roundings = {}
    for name, target in targets.items():
        if target.sources[0] not in tensors:
            continue
        made = [Rounding(tensors[source], tensors[scale_name(source)]) for source in target.sources]
        if made[0].codes.dim() == 3:
            ((codes, scale),) = made
            found |= {
                Place(name, expert): Rounding(*each)
                for expert, each in enumerate(zip(codes, scale, strict=True))
            }
        elif target.leaf == "weight":
            found[Place(name)] = made[0]
        else:
            found |= {Place(name, *divmod(index, target.parts)): each for index, each in enumerate(made)}
    return found
