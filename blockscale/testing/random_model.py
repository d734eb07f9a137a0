"""Models of any DeepSeek shape with random weights, made where they are computed with: no checkpoint."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch

from blockscale import ops
from blockscale.checkpoint.group_storage import PACKED, group_scale_name, group_storage
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.shapes import parameters_of
from blockscale.checkpoint.strips import dtype_of
from blockscale.formats import BlockFP8, scale_name
from blockscale.group_spelling import WrittenFormat
from blockscale.model.architecture import ModelConfig
from blockscale.model.linear import Compute
from blockscale.model.ranks import ONE, Ranks
from blockscale.model.store import Store
from blockscale.model.transformer import Transformer
from blockscale.model.weights import Weights
from blockscale.quantization_config import LowBitGroup, Quantization

_QUANTIZED = ("attention", "dense_mlp", "shared_experts", "experts")
_EXPERTS = r"re:.*\.experts\."  # of shared ones the name has no dot there


def random_model(
    config: ModelConfig,
    device: torch.device,
    *,
    fmt: BlockFP8 | None = None,
    experts: WrittenFormat | None = None,
    seed: int = 0,
    mtp: bool = False,
    ranks: Ranks = ONE,
    compute: Compute = "fp8",
) -> Transformer:
    """A BF16 model whose activations stay of the size of one: weights have variance 1 / inputs.

    Several ranks have parts of the same weights, of which each is made whole for that; experts only where
    they are.

    Args:
        config: its architecture.
        device: where it is made.
        fmt: of the linear layers that DeepSeek-V3 stores in FP8; None to leave them in BF16.
        experts: of the routed experts, if they are to have fewer than 8 bits.
        seed: of the weights; models of the same seed differ by quantization alone.
        mtp: with the multi-token prediction layer that the config must have.
        ranks: that share it.
        compute: how quantized weights are multiplied, see `Linear`.
    """
    entries = stored_tensors(config, fmt, experts)
    blocks = fmt or BlockFP8()
    groups = (LowBitGroup(experts, (_EXPERTS,)),) if experts is not None else ()
    signatures = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    low = low_bit_weights(signatures, Quantization("blockscale", blocks, low=groups))
    weights = Weights(
        Store(entries, _Maker(device, fmt, experts, seed).bytes_of),
        device,
        torch.bfloat16,
        blocks,
        compute,
        ranks=ranks,
        low=low,
    )
    return Transformer(config, weights, mtp=mtp)


def stored_tensors(
    config: ModelConfig, fmt: BlockFP8 | None, experts: WrittenFormat | None = None
) -> dict[str, TensorEntry]:
    """What a checkpoint of such a model holds, by name; places in files are not set."""
    family = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in parameters_of(config.model_dump() | {"model_type": family}).items():
        role = role_of(name) if len(shape) == 2 else None
        if experts is not None and role == "experts":
            found[name], found[group_scale_name(name)] = group_storage("blockscale", experts).signatures(
                shape
            )
        elif fmt is not None and role in _QUANTIZED:
            found[name], found[scale_name(name)] = ("F8_E4M3", shape), ("F32", fmt.scale_shape(shape))
        else:
            found[name] = dtype, shape
    return {name: TensorEntry(name, dtype, shape, "", 0, 0) for name, (dtype, shape) in found.items()}


def stored_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes that tensors take in files."""
    return sum(math.prod(entry.shape) * dtype_of(entry).itemsize for entry in entries)


class _Maker:
    """Makes what would have been read; a scale is asked for right after its weight."""

    def __init__(
        self, device: torch.device, fmt: BlockFP8 | None, experts: WrittenFormat | None, seed: int
    ) -> None:
        self._device, self._fmt, self._experts, self._seed = device, fmt, experts, seed
        self._scale: tuple[str, torch.Tensor] = "", torch.empty(0)

    def bytes_of(self, entry: TensorEntry) -> torch.Tensor:
        if entry.name == self._scale[0]:
            return _bytes(self._scale[1])
        if self._experts is not None and entry.dtype == PACKED:
            value = self._value(entry.name, group_storage("blockscale", self._experts).shape(entry.shape))
            codes, scale = ops.quantize_group(value.bfloat16(), self._experts)
            self._scale = group_scale_name(entry.name), scale
            return _bytes(codes)
        value = self._value(entry.name, entry.shape)
        if self._fmt is not None and entry.dtype == "F8_E4M3":
            fmt = self._fmt
            value, scale = ops.quantize_weight(value.bfloat16(), fmt.block_size, fmt.scale_fmt)
            self._scale = scale_name(entry.name), scale
        return _bytes(value.to(dtype_of(entry)))

    def _value(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight in float32, for which room is taken once: an embedding of 671B has 4 GB."""
        seed = zlib.crc32(f"{self._seed} {name}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        value = torch.randn(shape, generator=generator, device=self._device)
        if role_of(name) == "norm":
            value.mul_(0.1).add_(1)
        elif len(shape) == 1:
            value.mul_(0.1)  # a correction bias
        elif role_of(name) != "embedding":
            value.div_(math.sqrt(shape[-1]))
        return value


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
