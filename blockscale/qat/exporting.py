"""From a trained model to a checkpoint: master weights are saved, and `quantize_checkpoint` does the rest.

What a model trained is saved as transformers saves it, unquantized; from there layout, config.json, manifest,
shards and the files beside the weights are those of every quantization.

- With dynamic scales the converter rounds the master weights by the code that the training went through.
- With frozen or learned scales a `QatRounder` hands it codes and scales: the codes nearest to w / s.

Either way the checkpoint dequantizes to exactly what `fake_quantized_weights` gives. `verify --against` is
for the master weights, so keep them (`masters`): with dynamic scales it proves that every code is the
nearest; with others, which the manifest calls calibrated, it bounds the relative error of every weight, for
nothing in a checkpoint tells that a value saturated on purpose.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockscale import ops
from blockscale.calibrate.formats import QuantizedFormat, Rounding
from blockscale.calibrate.text import save_whole
from blockscale.checkpoint.convert import ConversionReport, RunOptions, quantize_checkpoint
from blockscale.checkpoint.plan import is_carried
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.rounded import scale_of_rounded
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import ScaleFmt
from blockscale.huggingface.mtp import DeepseekV3ForCausalLM
from blockscale.huggingface.partial import no_bars
from blockscale.qat.fake_quant import round_scaled
from blockscale.qat.modules import (
    FakeQuantLayer,
    fake_quant_layers,
    scale_shift_name,
    start_scale_name,
    storable_scale,
)
from blockscale.qat.preparation import Chosen, choose, saved_state
from blockscale.reference import checks


def export(
    model: Any,
    dst: str | os.PathLike[str],
    *,
    files: str | os.PathLike[str] | None = None,
    masters: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    run: RunOptions | None = None,
) -> ConversionReport:
    """Write a prepared model as a quantized checkpoint.

    Args:
        model: as `prepare` left it, trained.
        dst: folder or URL for the result.
        files: checkpoint whose tokenizer and other files beside the weights go along: the model's source.
        masters: folder for the unquantized master weights, what `verify --against` compares with. By default
            they are in a temporary one.
        dtype: of what is not quantized, and in config.json; by default as it is in the model. What
            transformers keeps in float32 stays so, and weights are quantized from the masters as they are.
        state_dict: whole tensors by the names of `model.state_dict()`, where the model is sharded.
        run: see `quantize_checkpoint`.

    Raises:
        BlockscaleError: the model is not prepared, or other weights of it train than its recipe says;
            `masters` holds files; see `quantize_checkpoint`.
        NonFiniteError: a weight holds NaN or Inf.
    """
    layers = dict(fake_quant_layers(model))
    if not layers:
        raise BlockscaleError("model is not prepared", where="export", remedy="call prepare(model, recipe)")
    recipe = next(iter(layers.values())).recipe
    chosen = choose(model, recipe)
    _check_same(layers, chosen)
    state = {name: each.detach() for name, each in (state_dict or model.state_dict()).items()}
    run = run or RunOptions()
    with ExitStack() as stack:
        made = masters or stack.enter_context(tempfile.TemporaryDirectory(prefix="blockscale-"))
        folder = Path(made)
        _check_empty(folder, run.overwrite)
        names = {each.target.name for each in chosen}
        save_masters(model, saved_state(model, state), names, folder, dtype)
        if files is not None:
            _carry(files, folder)
        scaled = any(start_scale_name(name) in state for name in names)
        rounder = QatRounder(state, chosen) if scaled else None
        return quantize_checkpoint(folder, dst, recipe, run=run, rounder=rounder)


def export_unquantized(
    model: Any,
    dst: Path,
    *,
    files: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Write a model that was not prepared as a checkpoint, whole or not at all; what is at `dst` goes.

    Args:
        model: of transformers.
        dst: folder for it.
        files: checkpoint whose tokenizer and other files beside the weights go along.
        state_dict: whole tensors by the names of `model.state_dict()`.
        dtype: see `save_masters`.
    """
    with tempfile.TemporaryDirectory(dir=dst.absolute().parent, prefix=f".{dst.name}-") as made:
        folder = Path(made) / "checkpoint"
        save_masters(model, saved_state(model, state_dict), set(), folder, dtype)
        _carry(files, folder)
        shutil.rmtree(dst, ignore_errors=True)
        folder.rename(dst)


@torch.no_grad()
def round_kept(model: Any, dtype: torch.dtype) -> None:
    """Give all that is not trained through its rounding the values that an export in this dtype has.

    What is measured afterwards is what the checkpoint does.
    """
    wide = tuple(model._get_dtype_plan(dtype))
    trained = {f"{path}.{name}" for path, layer in fake_quant_layers(model) for name in layer.trained}
    own = {make(name) for name in trained for make in (start_scale_name, scale_shift_name)} | trained
    for name, each in model.named_parameters():
        if name not in own and not any(pattern in name for pattern in wide):
            each.copy_(each.to(dtype))


def save_masters(
    model: Any, state: Mapping[str, torch.Tensor], trained: set[str], folder: Path, dtype: torch.dtype | None
) -> None:
    """Save a model unquantized, as transformers saves it.

    Args:
        model: of transformers.
        state: of `saved_state`.
        trained: those that keep their dtype.
        folder: for the files.
        dtype: of the other floating-point tensors, but for those that transformers keeps in float32, and in
            config.json; None leaves them as they are.
    """
    wide = () if dtype is None else tuple(model._get_dtype_plan(dtype))

    def keeps(name: str) -> bool:
        return name in trained or any(pattern in name for pattern in wide)

    cast = {
        name: each if dtype is None or keeps(name) or not each.is_floating_point() else each.to(dtype)
        for name, each in state.items()
    }
    if isinstance(model, DeepseekV3ForCausalLM):
        cast |= model.copies(cast, trained)  # a copy would not have the scales that were trained
    with no_bars():
        model.save_pretrained(folder, state_dict=cast)
    named = model.get_input_embeddings().weight.dtype if dtype is None else dtype
    config = model.config.__class__.from_pretrained(folder)
    config.dtype = named
    config.save_pretrained(folder)


@dataclass(frozen=True)
class QatRounder:
    """Hands codes and scales of a training to `quantize_checkpoint`; see `Rounder`.

    Attributes:
        state: the state dict of a prepared model.
        chosen: its weights that train.
    """

    state: Mapping[str, torch.Tensor]
    chosen: tuple[Chosen, ...]

    def settings(self) -> dict[str, Any]:
        """A hash of the scales; the weights are the source's."""
        digest = hashlib.sha256()
        for each in self.chosen:
            digest.update(self._scale(each).cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {"method": "training", "scales": digest.hexdigest()}

    def run(
        self, weights: Mapping[str, QuantizedFormat], scale_fmt: ScaleFmt, folder: Path, progress: Progress
    ) -> None:
        """Write the codes nearest to w / s, a file for every parameter of the model.

        Raises:
            NonFiniteError: a weight holds NaN or Inf.
        """
        mine = [each for each in self.chosen if each.target.sources[0] in weights]
        progress.start(sum(self.state[each.target.name].numel() for each in mine), len(mine))
        for each in mine:
            file = folder / f"{each.target.name}.safetensors"
            if not file.exists():
                save_whole(self._rounded(each), file)
            progress.advance(self.state[each.target.name].numel(), 1)

    def _rounded(self, each: Chosen) -> dict[str, torch.Tensor]:
        """Codes and scales under the names of the checkpoint."""
        weight, sources = self.state[each.target.name], each.target.sources
        count, first = ops.find_nonfinite(weight)
        if count:
            error = checks.non_finite("export", count, first, tuple(weight.shape))
            raise NonFiniteError(error.count, error.position, where=each.target.name)
        if each.target.parts > 1:
            weight = weight.reshape(-1, weight.shape[-2] // each.target.parts, weight.shape[-1])
        codes, scale = (made.cpu().contiguous() for made in round_scaled(weight, self._scale(each), each.fmt))
        pairs = [Rounding(codes, scale)]
        if len(sources) > 1:  # matrices of experts are apart in the checkpoint
            pairs = [Rounding(*pair) for pair in zip(codes.unbind(0), scale.unbind(0), strict=True)]
        tensors: dict[str, torch.Tensor] = {}
        for source, pair in zip(sources, pairs, strict=True):
            tensors |= {source: pair.codes, scale_of_rounded(source, each.fmt): pair.scale}
        return tensors

    def _scale(self, each: Chosen) -> torch.Tensor:
        start = self.state[start_scale_name(each.target.name)]
        return storable_scale(start, self.state.get(scale_shift_name(each.target.name)), each.fmt)


def _check_same(layers: Mapping[str, FakeQuantLayer], chosen: tuple[Chosen, ...]) -> None:
    trained = {
        f"{path}.{name}": own.fmt for path, layer in layers.items() for name, own in layer.trained.items()
    }
    wanted = {each.target.name: each.fmt for each in chosen}
    odd = next((name for name in {**trained, **wanted} if trained.get(name) != wanted.get(name)), None)
    if odd is not None:
        raise BlockscaleError(
            "does not train as the recipe of the model says",
            where=odd,
            expected=wanted.get(odd, "no quantization"),
            got=trained.get(odd, "no quantization"),
            remedy="leave the layers as prepare made them",
        )


def _check_empty(folder: Path, overwrite: bool) -> None:
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise BlockscaleError(
            "holds files already", where=folder, expected="an empty folder for the master weights"
        )


def _carry(files: str | os.PathLike[str], folder: Path) -> None:
    """Copy what a checkpoint has beside its weights and is not there yet."""
    source = open_source(files)
    for name in source.files():
        target = folder / name
        if is_carried(name) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            source.fetch(name, target)
