"""Models that are evaluated, behind one face: token ids to logits, prompts to what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from blockscale.evaluate.loading import Loading, open_model
from blockscale.model.gemm_names import gemm_names
from blockscale.model.generate import generate
from blockscale.model.prefill import all_logits
from blockscale.model.transformer import Transformer

OnToken = Callable[[int, int], bool]  # (number of the prompt, token) -> whether its text ends there


class Subject(Protocol):
    """A causal language model.

    Attributes:
        name: what the user calls it.
        device: where its logits are.
        context: most tokens of a sequence; None if there is no bound.
    """

    name: str
    device: torch.device
    context: int | None

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, T), on any device, -> (B, T, V), after every token."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: int | None, on_token: OnToken
    ) -> None:
        """Continue prompts by their likeliest tokens, and tell each as it comes.

        A text ends before `stop` or a token that the model's own config ends texts with, after so many
        tokens, or where `on_token` says so.
        """

    def first_nonfinite(self, ids: torch.Tensor) -> str | None:
        """The first part of the model that makes NaN or Inf of int64 (B, T); None if there is none."""

    def gemm_names(self) -> dict[torch.Tensor, str]:
        """Names of the weights that FP8 GEMMs multiply, for `ops.audit_gemms`."""


def open_subject(spec: str, loading: Loading) -> Subject:
    """Load a checkpoint folder, Hub repository or URL.

    Raises:
        BlockscaleError: see `loading.open_model`.
    """
    model = open_model(spec, loading)
    return RuntimeSubject(spec, model) if isinstance(model, Transformer) else TransformersSubject(spec, model)


class RuntimeSubject:
    """A model of `blockscale.model`."""

    def __init__(self, name: str, model: Transformer) -> None:
        self.name, self.device = name, model.device
        self.context: int | None = model.config.max_position_embeddings
        self._model = model

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Subject`."""
        sequences = ids.tolist()
        cache = self._model.cache(len(sequences), ids.shape[1])
        return torch.stack(all_logits(self._model, cache, sequences))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: int | None, on_token: OnToken
    ) -> None:
        """See `Subject`."""
        stops = [*self._model.config.eos_token_id, *([] if stop is None else [stop])]
        generate(self._model, prompts, max_new_tokens=max_new_tokens, stop=stops, on_token=on_token)

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
        config = getattr(model, "config", None)
        self.context: int | None = config and getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self._model = model.eval()

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Subject`."""
        logits: torch.Tensor = self._model(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: int | None, on_token: OnToken
    ) -> None:
        """See `Subject`; a prompt at a time, whatever the model's own config says of sampling."""
        own = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        stops = {stop, *(own if isinstance(own, list) else [own])}
        for number, prompt in enumerate(prompts):
            new, past = torch.tensor([prompt], device=self.device), None
            for _ in range(max_new_tokens):
                out = self._model(input_ids=new, past_key_values=past, use_cache=True)
                past, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
                token = int(new)
                if token in stops or on_token(number, token):
                    break

    def first_nonfinite(self, ids: torch.Tensor) -> str | None:
        """See `Subject`."""
        found: list[str] = []
        with watched(self._model, found):
            self.logits(ids)
        return found[0] if found else None

    def gemm_names(self) -> dict[torch.Tensor, str]:
        """See `Subject`."""
        return {weight: name for name, weight in self._model.named_parameters()}


@contextmanager
def watched(model: torch.nn.Module, found: list[str]) -> Iterator[None]:
    """Put the name of every module without children whose output is not finite on a list, in order."""

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
