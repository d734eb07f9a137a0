"""Calibrated rounding for `quantize_checkpoint`: weights of a checkpoint, rounded decoder layer by layer.

What a layer's weights became is written before the next layer begins. A run that was interrupted reads
finished layers back: they only pass both streams on. Weights outside the decoder layers, and such as no
module of the model multiplies with, are left to plain rounding.

In memory are one decoder layer at a time, and at the beginning what the first one's inputs come from. Only to
write text itself the model has to be there as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from blockscale import ops
from blockscale.calibrate.formats import QuantizedFormat, Rounding, inputs_of_format
from blockscale.calibrate.layerwise import Place, Roundings, round_layer
from blockscale.calibrate.rounding import Search
from blockscale.calibrate.stations import Chunk, Wanted, decoder_layers, first_chunks
from blockscale.calibrate.text import Calibration, save_whole
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.rounded import ExpertTokens, add_experts, add_inputs, scale_of_rounded
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import ScaleFmt
from blockscale.huggingface.load import load_as_stored
from blockscale.huggingface.modules import can_quantize
from blockscale.huggingface.partial import PartialModel, open_partial, parameters_outside, read_tensor
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

    def run(
        self, weights: Mapping[str, QuantizedFormat], scale_fmt: ScaleFmt, folder: Path, progress: Progress
    ) -> None:
        """Write codes and scales of these weights into the folder, a file for every decoder layer.

        Raises:
            BlockscaleError: an architecture that transformers does not know or that has no decoder layers, or
                fewer calibration tokens than a layer has inputs.
            NonFiniteError: a weight holds NaN or Inf; nobody looks at it again.
        """
        partial = open_partial(self._source)
        model = partial.model
        layers, prefix = decoder_layers(model)
        targets = _targets_of_layers(partial, weights, prefix)
        _check_tokens(model, prefix, targets, self._calibration.tokens)
        _refuse_nonfinite(partial, targets)
        progress.start(_bytes(model, prefix, targets), sum(map(len, targets.values())))
        chunks = self._chunks(partial, layers, prefix, folder)
        for number in range(len(layers)):
            mine = targets.get(number, {})
            file = folder / f"layer-{number:05d}.safetensors"
            known = _read(file, mine, weights) if file.exists() else None
            wanted = {name: _wanted(weights, each, scale_fmt) for name, each in mine.items()}
            layer = _taken_out(partial, layers, prefix, number)
            made = round_layer(layer.to(self._device).float(), chunks, wanted, self._search, known)
            size, needed = _layer_bytes(layer, mine), _inputs(layer, mine)
            del layer  # before the next one is read
            if known is None and made.roundings:
                for path, counts in made.tokens.items():
                    add_experts(folder, _told(number, counts, needed[path]))
                add_inputs(folder, _inputs_of_sources(made.amax, mine))
                _write(file, made.roundings, mine, weights)
            progress.advance(size, len(mine))

    def _chunks(self, partial: PartialModel, layers: nn.ModuleList, prefix: str, folder: Path) -> list[Chunk]:
        """Both streams before the first layer; what lies outside the layers is in memory only here."""

        def whole() -> nn.Module:
            return load_as_stored(self._source)

        ids = self._calibration.token_ids(whole, folder / ".tokens.safetensors", self._device)
        outside = parameters_outside(partial.model, prefix)
        partial.load(outside)
        with _set_aside(layers):
            partial.model.float()
        chunks = first_chunks(partial.model, layers, ids, _ROWS)
        with _set_aside(layers):
            partial.model.to_empty(device="meta")
        return chunks


@contextmanager
def _set_aside(layers: nn.ModuleList) -> Iterator[None]:
    """What is done to the model is not done to its layers."""
    kept = list(layers)
    for number in range(len(kept)):
        layers[number] = nn.Identity()
    try:
        yield
    finally:
        for number, layer in enumerate(kept):
            layers[number] = layer


def _taken_out(partial: PartialModel, layers: nn.ModuleList, prefix: str, number: int) -> nn.Module:
    """A decoder layer, in memory, and no longer part of the model."""
    partial.load([name for name in partial.model.state_dict() if name.startswith(f"{prefix}.{number}.")])
    layer, layers[number] = layers[number], nn.Identity()
    return layer


def _targets_of_layers(
    partial: PartialModel, weights: Mapping[str, QuantizedFormat], prefix: str
) -> dict[int, dict[str, Target]]:
    """Decoder layer -> path of a parameter in it -> what it is made of, of parameters that can be rounded."""
    found: dict[int, dict[str, Target]] = {}
    tensors = {name: (entry.dtype, entry.shape) for name, entry in partial.entries.items()}
    for target in find_targets(partial.model, tensors, weights.keys()):
        module = partial.model.get_submodule(target.path)
        if target.name.startswith(f"{prefix}.") and can_quantize(module, target.leaf):
            number, _, name = target.name.removeprefix(f"{prefix}.").partition(".")
            found.setdefault(int(number), {})[name] = target
    return found


def _wanted(weights: Mapping[str, QuantizedFormat], target: Target, scale_fmt: ScaleFmt) -> Wanted:
    """How a parameter is to be rounded; a plan has one format for all that it is made of."""
    fmt = weights[target.sources[0]]
    return Wanted(fmt, inputs_of_format(fmt, scale_fmt), target.parts)


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


def _refuse_nonfinite(partial: PartialModel, targets: Mapping[int, Mapping[str, Target]]) -> None:
    """Read every weight once before hours go into the first of them."""
    names = [name for mine in targets.values() for target in mine.values() for name in target.sources]
    for name in names:
        weight = read_tensor(partial.source, partial.entries[name])
        count, first = ops.find_nonfinite(weight)
        if count:
            position = tuple(int(each) for each in torch.unravel_index(torch.tensor(first), weight.shape))
            raise NonFiniteError(count, position, where=name)


def _bytes(model: nn.Module, prefix: str, targets: Mapping[int, Mapping[str, Target]]) -> int:
    return sum(
        _layer_bytes(model.get_submodule(f"{prefix}.{number}"), mine) for number, mine in targets.items()
    )


def _layer_bytes(layer: nn.Module, targets: Mapping[str, Target]) -> int:
    """Values of the weights that are rounded, which is the bytes of their codes."""
    return sum(layer.get_parameter(name).numel() for name in targets)


def _inputs(layer: nn.Module, targets: Mapping[str, Target]) -> dict[str, int]:
    """Path of a module -> the most inputs of its weights that are rounded."""
    widths: dict[str, int] = {}
    for name in targets:
        path = name.rpartition(".")[0]
        widths[path] = max(widths.get(path, 0), layer.get_parameter(name).shape[-1])
    return widths


def _inputs_of_sources(
    amax: Mapping[tuple[str, int], float], targets: Mapping[str, Target]
) -> dict[str, float]:
    """Tensors of the checkpoint that hold experts -> the largest absolute value of their inputs."""
    found: dict[str, float] = {}
    for (name, expert), value in amax.items():
        target = targets[name]
        merged = len(target.sources) == 1  # one tensor holds all experts
        parts = slice(0, 1) if merged else slice(expert * target.parts, (expert + 1) * target.parts)
        for source in target.sources[parts]:
            found[source] = max(found.get(source, 0.0), value)
    return found


def _told(layer: int, tokens: tuple[int, ...], needed: int) -> ExpertTokens:
    """What the user is told of the experts of a layer."""
    plain = tuple(expert for expert, count in enumerate(tokens) if count < needed)
    return ExpertTokens(layer, len(tokens), min(tokens), median(tokens), needed, plain)


def _write(
    file: Path, found: Roundings, targets: Mapping[str, Target], weights: Mapping[str, QuantizedFormat]
) -> None:
    """Codes and scales under the names of the checkpoint; all of them or no file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, target in targets.items():
        places = [place for place in found if place.parameter == name]
        fmt = weights[target.sources[0]]
        merged = len(target.sources) < len(places)  # one tensor holds all experts
        if merged:
            (source,) = target.sources
            tensors[source] = torch.stack([found[place].codes for place in places]).cpu()
            tensors[scale_of_rounded(source, fmt)] = torch.stack(
                [found[place].scale for place in places]
            ).cpu()
            continue
        for place, source in zip(places, target.sources if places else (), strict=True):
            tensors[source] = found[place].codes.cpu().contiguous()
            tensors[scale_of_rounded(source, fmt)] = found[place].scale.cpu().contiguous()
    save_whole(tensors, file)


def _read(file: Path, targets: Mapping[str, Target], weights: Mapping[str, QuantizedFormat]) -> Roundings:
    """What `_write` has written."""
    tensors = load_file(file)
    found: Roundings = {}
    for name, target in targets.items():
        if target.sources[0] not in tensors:
            continue
        fmt = weights[target.sources[0]]
        made = [
            Rounding(tensors[source], tensors[scale_of_rounded(source, fmt)]) for source in target.sources
        ]
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
