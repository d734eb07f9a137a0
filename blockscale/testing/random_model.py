"""Models of any DeepSeek shape with random weights, made where they are computed with: no checkpoint."""

from __future__ import annotations

import math
import zlib

import torch

from blockscale import ops
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.shapes import parameters_of
from blockscale.checkpoint.strips import dtype_of
from blockscale.formats import BlockFP8, scale_name, scaled_weight_name
from blockscale.model.architecture import ModelConfig
from blockscale.model.ranks import ONE, Ranks
from blockscale.model.store import Store
from blockscale.model.transformer import Transformer
from blockscale.model.weights import Weights

_QUANTIZED = ("attention", "dense_mlp", "shared_experts", "experts")


def random_model(
    config: ModelConfig,
    device: torch.device,
    *,
    fmt: BlockFP8 | None = None,
    seed: int = 0,
    mtp: bool = False,
    ranks: Ranks = ONE,
) -> Transformer:
    """A BF16 model whose activations stay of the size of one: weights have variance 1 / inputs.

    Several ranks have parts of the same weights, each of which is made whole for that.

    Args:
        config: its architecture.
        device: where it is made.
        fmt: of the linear layers that DeepSeek-V3 stores in FP8; None to leave them in BF16.
        seed: of the weights; models of the same seed differ by quantization alone.
        mtp: with the multi-token prediction layer that the config must have.
        ranks: that share it.
    """
    entries = _entries(config, fmt)
    store = Store(entries, _Maker(device, fmt, seed).bytes_of)
    weights = Weights(store, device, torch.bfloat16, fmt or BlockFP8(), ranks=ranks)
    return Transformer(config, weights, mtp=mtp)


def _entries(config: ModelConfig, fmt: BlockFP8 | None) -> dict[str, TensorEntry]:
    family = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    entries = {}
    for name, (dtype, shape) in parameters_of(config.model_dump() | {"model_type": family}).items():
        quantized = len(shape) == 2 and role_of(name) in _QUANTIZED
        entries[name] = TensorEntry(name, "F8_E4M3" if fmt and quantized else dtype, shape, "", 0, 0)
        if fmt and quantized:
            scale = scale_name(name)
            entries[scale] = TensorEntry(scale, "F32", fmt.scale_shape(shape), "", 0, 0)
    return entries


class _Maker:
    """Makes what would have been read; a scale is asked for right after its weight."""

    def __init__(self, device: torch.device, fmt: BlockFP8 | None, seed: int) -> None:
        self._device, self._fmt, self._seed = device, fmt, seed
        self._scale = torch.empty(0)

    def bytes_of(self, entry: TensorEntry) -> torch.Tensor:
        if scaled_weight_name(entry.name) is not None:
            return self._scale.view(-1).view(torch.uint8)
        seed = zlib.crc32(f"{self._seed} {entry.name}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        value = torch.randn(entry.shape, generator=generator, device=self._device)
        if role_of(entry.name) == "norm":
            value = 1 + 0.1 * value
        elif len(entry.shape) == 1:
            value = 0.1 * value  # a correction bias
        elif role_of(entry.name) != "embedding":
            value = value / math.sqrt(entry.shape[-1])
        if self._fmt is not None and entry.dtype == "F8_E4M3":
            value, self._scale = ops.quantize_weight(
                value.bfloat16(), self._fmt.block_size, self._fmt.scale_fmt
            )
        return value.to(dtype_of(entry)).view(-1).view(torch.uint8)
