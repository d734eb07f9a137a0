"""The loss and the gradients of a step: launched kernel by kernel, or replayed as a CUDA graph.

The host of a small model takes longer to launch a step than the GPU to compute it, and with layers that round
in Python longer still. A graph replays the same kernels on the same addresses: tokens are copied to where
they were, gradients are found where they were, and overwrite those of the step before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import masking_utils

from blockscale.huggingface.mtp import DeepseekV3ForCausalLM
from blockscale.ops.capture import capture
from blockscale.qat.arithmetic import Arithmetic
from blockscale.qat.losses import MTP_WEIGHT, divergence, next_token_loss

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """What training makes small.

    Attributes:
        model: of transformers.
        teacher: to distill from; None for the next token of the text.
        arithmetic: of forward passes.
        micro_batch: sequences at a time; None for all.
    """

    model: Any
    teacher: Any
    arithmetic: Arithmetic
    micro_batch: int | None

    def parts(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The micro-batches of a step's int64 (B, T)."""
        return ids.split(self.micro_batch or len(ids))

    def backward(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss over int64 (B, T), a float32 scalar; its gradients are added to the parameters'."""
        parts = self.parts(ids)
        losses = []
        with one_sequence_a_row():
            for part in parts:
                loss = self._loss(part) / len(parts)
                loss.backward()
                losses.append(loss.detach())
        return torch.stack(losses).sum()

    def predicted(self, ids: torch.Tensor) -> Any:
        """What the model says of int64 (B, T): `logits`, and `drafts` where it makes them."""
        drafts = {"drafts": True} if isinstance(self.model, DeepseekV3ForCausalLM) else {}
        with self.arithmetic():
            return self.model(input_ids=ids, use_cache=False, **drafts)

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        found, targets = self.predicted(ids), ids
        compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = next_token_loss
        if self.teacher is not None:
            compare = divergence
            with torch.no_grad():
                targets = self.teacher(input_ids=ids, use_cache=False).logits
        loss = compare(found.logits, targets)
        drafts = getattr(found, "drafts", None)
        return loss if drafts is None else loss + MTP_WEIGHT * compare(drafts, targets[:, 1:])


class Gradients:
    """Gradients of a step, in the parameters' `grad`."""

    def __init__(
        self,
        backward: Callable[[torch.Tensor], torch.Tensor],
        parameters: Iterable[nn.Parameter],
        captures: bool,
        beside: Gradients | None = None,
    ) -> None:
        """Of the first step nothing is captured: kernels are compiled in it.

        Args:
            backward: int64 (B, T) -> the loss, with gradients added to the parameters'. Where it is captured
                it must not read from the device, and all steps have one shape.
            parameters: of which there are gradients.
            captures: whether steps are replayed, on a GPU.
            beside: one whose memory this one shares: of both only the gradients outlast the other's step.
        """
        self._backward, self._parameters = backward, list(parameters)
        self._captures, self._beside = captures, beside
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._loss = torch.empty(0)

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graph is not None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of int64 (B, T), a scalar that the next step may overwrite."""
        if self._captures and self._warm and self._graph is None:
            self._graph = self._captured(ids)
        if self._graph is None:
            self._warm = True
            return self._backward(ids)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._loss

    def clear(self) -> None:
        """To be called between steps; a graph needs its gradients where they are."""
        if self._graph is None:
            for each in self._parameters:
                each.grad = None

    def _captured(self, ids: torch.Tensor) -> torch.cuda.CUDAGraph | None:
        self._ids, graph = ids.clone(), torch.cuda.CUDAGraph()
        try:
            with capture(graph, self._beside._graph if self._beside else None):
                self._loss = self._backward(self._ids)
        except RuntimeError as error:
            self._captures = False
            self.clear()
            reason = str(error).partition("\n")[0]
            _logger.warning("a step cannot be captured, and is launched kernel by kernel: %s", reason)
            return None
        return graph


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that no row of a batch has several sequences.

    It would find out by the positions, which has the host wait for the device. In a capture it cannot, and
    gives attention masks of all pairs of positions, with which the fastest kernels do not work.
    """
    finds = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = finds
