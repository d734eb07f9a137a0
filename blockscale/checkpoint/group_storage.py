"""How a layout stores a weight of fewer than 8 bits: names, dtypes, shapes and bytes of its tensors.

Our codes and scales (`group_formats`) are what every layout is made of and read back as. Of a weight X (N, K)
or, in our own layout alone, (E, N, K) there are on disk, all lossless:

    blockscale          X.weight          uint8 (N, bytes of a row)      X.weight_scale      BF16 or E8M0
    compressed-tensors  X.weight_packed   int32 (N, K * bits / 32)       X.weight_scale      BF16
                        X.weight_shape    int64 (2,): N, K
        MXFP4           X.weight_packed   uint8 (N, K / 2)               X.weight_scale      uint8: E8M0
    w4afp8              X.weight          int8 (N, K / 2)                X.weight_scale_inv  BF16
                        X.input_scale     BF16 (1,): input = FP8 * input_scale

Scales are (N, K / group) everywhere, and powers of two are BF16 values too. All but our own layout have whole
groups.

Sources: compressed-tensors 0.20 `compressors/pack_quantized` and `compressors/mxfp4`; SGLang 0.5
`layers/quantization/w4afp8.py` (scales are float32 parameters rounded to BF16, input scales BF16 ones) and
`layers/moe/fused_moe_triton/layer.py`, which refuses input scales of w1 and w3 that differ by more than 1e-5
from what BF16 made of the first: so they are written as BF16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from blockscale.checkpoint.skip_list import Signature
from blockscale.errors import BlockscaleError, MissingScaleError
from blockscale.formats import DTYPE_NAMES, E4M3_MAX, SAFETENSORS_DTYPES, Layout, module_path, tensor_nbytes
from blockscale.group_formats import MXFP4, GroupInt, group_scale_shape, packed_shape, packed_width
from blockscale.group_spelling import WrittenFormat, spell_group_format
from blockscale.quantization_config import Quantization
from blockscale.reference import packing

PACKED = "U8"
_Convert = Callable[[torch.Tensor, int], torch.Tensor]  # of rows of codes, and their K
# Last names of weights that are multiplied with the same input and have one input scale.
_TWINS = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}


@dataclass(frozen=True)
class GroupStorage:
    """The tensors of a weight of fewer than 8 bits in one layout.

    Attributes:
        fmt: what its codes and scales mean.
        codes: behind the name of the weight: the codes.
        scale: behind the name of the weight: the scales.
        more: behind the module path: what else there is.
        codes_dtype: safetensors dtype of the codes.
        scale_dtype: safetensors dtype of the scales.
        whole: whether K has to be a multiple of the group.
        stored: packed codes as the layout has them.
        packed: the inverse of it.
    """

    fmt: WrittenFormat
    codes: str
    scale: str
    more: tuple[str, ...]
    codes_dtype: str
    scale_dtype: str
    whole: bool
    stored: _Convert
    packed: _Convert

    def signatures(self, shape: tuple[int, ...]) -> tuple[Signature, Signature]:
        """(dtype, shape) of the codes and of the scales of a weight of this shape."""
        rows, size = packed_shape(shape, self.fmt), SAFETENSORS_DTYPES[self.codes_dtype]
        assert size is not None
        codes = (*rows[:-1], rows[-1] // size.itemsize)
        return (self.codes_dtype, codes), (self.scale_dtype, group_scale_shape(shape, self.fmt))

    def more_signatures(self, weight: str) -> dict[str, Signature]:
        """Name -> (dtype, shape) of what there is beside codes and scales."""
        known = {"weight_shape": ("I64", (2,)), "input_scale": ("BF16", (1,))}
        return {f"{module_path(weight)}.{leaf}": known[leaf] for leaf in self.more}

    def nbytes(self, weight: str, shape: tuple[int, ...]) -> int:
        """Bytes of all tensors of a weight of this name and shape."""
        each = *self.signatures(shape), *self.more_signatures(weight).values()
        return sum(tensor_nbytes(*signature) for signature in each)

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (..., N, K) of the weight whose stored codes have this shape.

        Raises:
            BlockscaleError: no whole number of values.
        """
        size, unit = SAFETENSORS_DTYPES[self.codes_dtype], values_in_unit(self.fmt)
        assert size is not None
        units, rest = divmod(codes[-1] * size.itemsize, packed_width(unit, self.fmt.bits))
        ragged = self.whole and units * unit % self.fmt.group_size
        if len(codes) not in ((2,) if self.whole else (2, 3)) or rest or ragged:
            raise BlockscaleError(f"no codes of {spell_group_format(self.fmt)}", got=f"shape {list(codes)}")
        return (*codes[:-1], units * unit)

    def stored_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales of the format in the dtype of the layout: E8M0 as bytes or BF16, without loss."""
        dtype = SAFETENSORS_DTYPES[self.scale_dtype]
        assert dtype is not None
        return scale.view(torch.uint8) if dtype == torch.uint8 else scale.to(dtype)

    def own_scale(self, stored: torch.Tensor) -> torch.Tensor:
        """The inverse of `stored_scale`."""
        return (
            stored.view(self.fmt.scale_dtype)
            if stored.dtype == torch.uint8
            else stored.to(self.fmt.scale_dtype)
        )


@dataclass(frozen=True)
class LowBitWeight:
    """A weight of fewer than 8 bits in a checkpoint: its name before quantization, and how it is stored."""

    name: str
    storage: GroupStorage

    @property
    def fmt(self) -> WrittenFormat:
        return self.storage.fmt

    @property
    def codes(self) -> str:
        return self.name + self.storage.codes

    @property
    def scale(self) -> str:
        return self.name + self.storage.scale

    @property
    def companions(self) -> tuple[str, ...]:
        """Names of all that is stored beside the codes."""
        return (self.scale, *self.storage.more_signatures(self.name))


def group_storage(layout: Layout, fmt: WrittenFormat) -> GroupStorage:
    """How a layout stores a format of fewer than 8 bits.

    Raises:
        BlockscaleError: it has no place for it; `Quantization` has told, where there is one.
    """
    if layout == "blockscale":
        scale = DTYPE_NAMES[fmt.scale_dtype]
        return GroupStorage(fmt, "", "_scale", (), PACKED, scale, False, _as_it_is, _as_it_is)
    if layout == "w4afp8" and isinstance(fmt, GroupInt):
        convert = packing.to_w4afp8, _from_w4afp8
        return GroupStorage(fmt, "", "_scale_inv", ("input_scale",), "I8", "BF16", True, *convert)
    if layout == "compressed-tensors" and isinstance(fmt, MXFP4):
        return GroupStorage(fmt, "_packed", "_scale", (), PACKED, PACKED, True, _as_it_is, _as_it_is)
    if layout == "compressed-tensors" and isinstance(fmt, GroupInt):
        words = partial(_to_words, bits=fmt.bits), partial(_from_words, bits=fmt.bits)
        return GroupStorage(fmt, "_packed", "_scale", ("weight_shape",), "I32", "BF16", True, *words)
    raise BlockscaleError(f"the {layout} layout has no place for {spell_group_format(fmt)}")


def activations_note(quantization: Quantization | None, quantizes: bool) -> str:
    """What a line about a loaded model says where inputs of layers are not treated as engines treat them.

    Args:
        quantization: of the checkpoint.
        quantizes: whether this package quantizes activations.
    """
    if quantization is not None and quantization.weights_only:
        return "; weights alone are quantized, activations stay as they are"
    if quantization is None or not quantization.low or quantization.layout == "blockscale":
        return ""
    how = f"not as engines do by the {quantization.layout} layout"
    return f"; activations in FP8 groups of 128, {how}" if quantizes else ""


def group_scale_name(weight: str) -> str:
    """Name of the scales beside a weight of fewer than 8 bits in our own layout."""
    return f"{weight}_scale"


def values_in_unit(fmt: WrittenFormat) -> int:
    """Values that fill whole bytes."""
    return 8 if fmt.bits == 3 else 2


def check_companions(weight: LowBitWeight, tensors: Mapping[str, Signature]) -> None:
    """Refuse codes without scales, or with such as do not belong to them.

    Raises:
        MissingScaleError: there are none.
        BlockscaleError: another dtype or shape than the format says.
    """
    spelled = spell_group_format(weight.fmt)
    if weight.scale not in tensors:
        raise MissingScaleError(
            f"{spelled} weight without scales", where=weight.codes, expected=f"{weight.scale} beside it"
        )
    storage = weight.storage
    expected = storage.signatures(storage.shape(tensors[weight.codes][1]))[1]
    if tensors[weight.scale] != expected:
        wanted, got = (f"{dtype} {list(shape)}" for dtype, shape in (expected, tensors[weight.scale]))
        raise BlockscaleError(f"scales do not fit {spelled}", where=weight.scale, expected=wanted, got=got)


def companion(name: str, shape: tuple[int, ...], amax: float | None) -> torch.Tensor:
    """The value of one of `GroupStorage.more_signatures`.

    Args:
        name: of the tensor.
        shape: of the weight.
        amax: the largest absolute value of the weight's input, or None if it is not known.
    """
    if name.endswith(".weight_shape"):
        return torch.tensor(shape, dtype=torch.int64)
    return torch.tensor([1.0 if amax is None else _up(amax / E4M3_MAX)], dtype=torch.bfloat16)


def amax_of(weight: str, input_amax: Mapping[str, float]) -> float | None:
    """The largest absolute input of a weight and of that which has the same input; None if not known."""
    parent, _, leaf = module_path(weight).rpartition(".")
    names = [weight] + ([f"{parent}.{_TWINS[leaf]}.weight"] if leaf in _TWINS else [])
    return max((input_amax[name] for name in names if input_amax.get(name, 0.0) > 0), default=None)


def is_expert(name: str) -> bool:
    """Whether a weight is that of a routed expert of its own, as `...experts.7.up_proj.weight`."""
    return re.search(r"\.experts\.\d+\.\w+\.weight$", name) is not None


def _up(value: float) -> float:
    """Rounded up to BF16, so that the largest input does not saturate."""
    nearest = torch.tensor(value, dtype=torch.bfloat16)
    while float(nearest) < value:
        nearest = torch.nextafter(nearest, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return float(nearest)


def _as_it_is(codes: torch.Tensor, width: int) -> torch.Tensor:
    return codes


def _from_w4afp8(codes: torch.Tensor, width: int) -> torch.Tensor:
    return packing.from_w4afp8(codes)


def _to_words(codes: torch.Tensor, width: int, *, bits: int) -> torch.Tensor:
    return packing.to_compressed_tensors(codes, bits, width)


def _from_words(words: torch.Tensor, width: int, *, bits: int) -> torch.Tensor:
    return packing.from_compressed_tensors(words, bits, width)
