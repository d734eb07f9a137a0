"""Models that are evaluated, behind one face: token ids to logits.

DeepSeek-V2 and V3 run on `blockscale.model`, everything else on transformers, with blockscale's own linear
layers where weights are FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.model_config import CONFIG_NAME, parse_config
from blockscale.checkpoint.precision import AS_STORED, Precision
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import Source, open_source
from blockscale.errors import BlockscaleError
from blockscale.formats import parse_quantization_config
from blockscale.model.gemm_names import gemm_names
from blockscale.model.linear import Compute
from blockscale.model.load import load_model
from blockscale.model.prefill import all_logits
from blockscale.model.transformer import Transformer
from blockscale.ops.gemm_dispatch import has_fp8

Runtime = Literal["auto", "blockscale", "transformers"]
_OURS = ("deepseek_v2", "deepseek_v3")


class Subject(Protocol):
    """A causal language model.

    Attributes:
        name: what the user calls it.
        device: where its logits are.
    """

    name: str
    device: torch.device

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, T), on any device, -> (B, T, V), after every token."""

    def first_nonfinite(self, ids: torch.Tensor) -> str | None:
        """The first part of the model that makes NaN or Inf of int64 (B, T); None if there is none."""

    def gemm_names(self) -> dict[torch.Tensor, str]:
        """Names of the weights that FP8 GEMMs multiply, for `ops.audit_gemms`."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and run.

    Attributes:
        runtime: "auto" takes `blockscale.model` for the architectures it knows.
        device: "cpu", "cuda" or "auto".
        dtype: of activations and of weights that are not FP8; default bfloat16 on GPUs, else float32.
        compute: "fp8" multiplies FP8 weights with quantized activations, "high" with activations as they are;
            None takes "fp8" where the device has FP8 arithmetic.
        precision: what linear layers are quantized or dequantized to as they are read.
        revision: of a Hub repository.
        batch_size: windows at a time.
    """

    runtime: Runtime = "auto"
    device: str = "auto"
    dtype: torch.dtype | None = None
    compute: Compute | None = "fp8"
    precision: Precision = AS_STORED
    revision: str | None = None
    batch_size: int = 1

    def resolved(self) -> Loading:
        """The same with the device, dtype and arithmetic that are taken here.

        Raises:
            BlockscaleError: no such device.
        """
        device = torch.device(usable_device(self.device))
        return replace(
            self,
            device=device.type,
            dtype=self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32),
            compute=self.compute or ("fp8" if has_fp8(device) else "high"),
        )


def read_config(source: Source) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        BlockscaleError: there is none, or it is damaged.
    """
    if not source.exists(CONFIG_NAME):
        raise BlockscaleError("no config", where=source.spec, expected=CONFIG_NAME)
    return parse_config(source.read(CONFIG_NAME), source.path(CONFIG_NAME))


def open_subject(spec: str, loading: Loading) -> Subject:
    """Load a checkpoint folder, Hub repository or URL.

    Raises:
        BlockscaleError: no such model, or one that the runtime that was asked for does not know.
    """
    loading = loading.resolved()
    assert loading.dtype is not None
    source = open_source(spec, loading.revision)
    family = read_config(source).get("model_type")
    if loading.runtime == "blockscale" and family not in _OURS:
        raise BlockscaleError(
            "not an architecture of this runtime",
            where=f"{spec}: {CONFIG_NAME}: model_type",
            expected=" | ".join(_OURS),
            got=family,
            remedy="--runtime transformers",
        )
    if family in _OURS and loading.runtime != "transformers":
        model = load_model(
            source,
            device=loading.device,
            dtype=loading.dtype,
            compute=loading.compute,
            precision=loading.precision,
        )
        return RuntimeSubject(spec, model)
    return TransformersSubject(spec, load_transformers(source, loading).to(loading.device))


def load_transformers(source: Source, loading: Loading) -> torch.nn.Module:
    """A model of transformers on the CPU, with this package's layers where weights are or become FP8.

    Raises:
        BlockscaleError: a source that transformers does not read, or weights that do not fit together.
    """
    if not source.is_local and "://" in source.spec:
        expected = "a local folder or a Hub repository"
        raise BlockscaleError("transformers reads no URLs", where=source.spec, expected=expected)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from blockscale.huggingface import BlockscaleConfig
    from blockscale.huggingface import load_model as load_quantized

    logging.disable_progress_bar()
    place, _, revision = source.spec.partition("@")
    options: dict[str, Any] = {"dtype": loading.dtype}
    if source.is_local:
        place = source.root
    elif revision or loading.revision:
        options["revision"] = revision or loading.revision
    recipe = Recipe(precision=loading.precision) if loading.precision.entries else None
    loaded: torch.nn.Module
    if recipe is None and not is_quantized(source):
        loaded = AutoModelForCausalLM.from_pretrained(place, **options)
    else:
        compute: Literal["auto", "high"] = "auto" if loading.compute == "fp8" else "high"
        loaded = load_quantized(place, BlockscaleConfig(compute, recipe or False), **options)
    return loaded.eval()


class RuntimeSubject:
    """A model of `blockscale.model`."""

    def __init__(self, name: str, model: Transformer) -> None:
        self.name, self.device = name, model.device
        self._model = model

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Subject`."""
        sequences = ids.tolist()
        cache = self._model.cache(len(sequences), ids.shape[1])
        return torch.stack(all_logits(self._model, cache, sequences))

    def first_nonfinite(self, ids: torch.Tensor) -> str | None:
        """See `Subject`."""
        found: list[str] = []
        layers = self._model.layers

        def watched(number: int, layer: Any) -> Any:
            def run(*arguments: Any) -> Any:
                result = layer(*arguments)
                if not found and not all(bool(each.isfinite().all()) for each in result):
                    found.append(f"model.layers.{number}")
                return result

            return run

        self._model.layers = [watched(number, layer) for number, layer in enumerate(layers)]
        try:
            self.logits(ids)
        finally:
            self._model.layers = layers
        return found[0] if found else None

    def gemm_names(self) -> dict[torch.Tensor, str]:
        """See `Subject`."""
        return gemm_names(self._model)


class TransformersSubject:
    """A causal language model of transformers, or a module that is called like one."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.name, self.device = name, next(model.parameters()).device
        self._model = model.eval()

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Subject`."""
        logits: torch.Tensor = self._model(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    def first_nonfinite(self, ids: torch.Tensor) -> str | None:
        """See `Subject`."""
        found: list[str] = []
        with _watched(self._model, found):
            self.logits(ids)
        return found[0] if found else None

    def gemm_names(self) -> dict[torch.Tensor, str]:
        """See `Subject`."""
        return {weight: name for name, weight in self._model.named_parameters()}


@contextmanager
def _watched(model: torch.nn.Module, found: list[str]) -> Iterator[None]:
    """Note the name of every module without children whose output is not finite."""

    def note(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if (
                isinstance(output, torch.Tensor)
                and output.is_floating_point()
                and not output.isfinite().all()
            ):
                found.append(name)

        return hook

    leaves = [(name, each) for name, each in model.named_modules() if not list(each.children())]
    hooks = [module.register_forward_hook(note(name)) for name, module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_quantized(source: Source) -> bool:
    """Whether a checkpoint's config says that its weights are quantized."""
    return parse_quantization_config(read_config(source)) is not None
