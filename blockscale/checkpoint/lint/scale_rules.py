"""Scales: there, called as the engine calls them, of the shape and dtype that it has room for."""

from __future__ import annotations

from collections.abc import Iterator

from blockscale.checkpoint.decide import FP8, scale_of
from blockscale.checkpoint.families import family_of, stored_block_size
from blockscale.checkpoint.lint.finding import Finding
from blockscale.checkpoint.lint.subject import Subject
from blockscale.errors import BlockscaleError
from blockscale.formats import scale_shape, scaled_weight_name

_CAST = ("F32", "BF16", "F16", "F8_E8M0")  # what becomes a float32 scale by a cast, with its value


def fp8_scales(subject: Subject) -> Iterator[Finding]:
    """Every FP8 weight has a scale of the name and grid that the engine makes room for."""
    if subject.quantization is None:
        return
    family = family_of(subject.config)
    for name, (dtype, shape) in subject.tensors.items():
        if dtype != FP8:
            continue
        wanted = name + subject.scale_suffix
        found = scale_of(name, subject.tensors)
        if wanted not in subject.tensors:
            what = "FP8 weight without a scale: the engine's own is never filled"
            remedy = "fetch the missing shard, or convert again"
            yield Finding("silent", "missing-scale", name, what, wanted, found or "none", remedy)
            continue
        try:
            block = stored_block_size(subject.quantization.block_size_of(name), shape, family)
            expected = scale_shape(shape, block)
        except BlockscaleError as error:
            yield Finding("error", "scale-shape", name, str(error))
            continue
        scale, grid = subject.tensors[wanted]
        if grid != expected:
            what = "scale grid does not fit the block size of config.json"
            yield Finding("error", "scale-shape", wanted, what, str(list(expected)), str(list(grid)))
        yield from _dtype(subject, wanted, scale)


def _dtype(subject: Subject, name: str, dtype: str) -> Iterator[Finding]:
    if dtype not in _CAST:
        what = "scale has a dtype that is cast to other values"
        yield Finding("silent", "scale-dtype", name, what, " | ".join(_CAST), dtype)
    elif dtype == "F8_E8M0" and subject.entry.get("scale_fmt") != "ue8m0":
        what = "scale is a byte of exponent, and config.json does not say scale_fmt ue8m0"
        remedy = 'set "scale_fmt": "ue8m0"'
        yield Finding("warning", "scale-dtype", name, what, "F32", dtype, remedy)
    elif dtype == "F32" or dtype == "F8_E8M0":
        return
    else:
        yield Finding("warning", "scale-dtype", name, "scale is rounded further than float32", "F32", dtype)


def stray_scales(subject: Subject) -> Iterator[Finding]:
    """A scale without its weight, or of one that is not quantized, tells of a conversion that went wrong."""
    companions = {name for each in subject.low.values() for name in each.companions}
    for name in subject.tensors:
        weight = scaled_weight_name(name)
        if weight is None or name in companions or not weight.endswith(".weight"):
            continue
        if weight not in subject.tensors:
            what = "scale without its weight: the engine has no parameter for it"
            yield Finding("error", "stray-scale", name, what, expected=weight)
        elif subject.tensors[weight][0] in ("BF16", "F16", "F32"):
            what = f"scale of a weight that is {subject.tensors[weight][0]}"
            yield Finding(
                "silent", "stray-scale", name, what, "FP8", remedy="remove it, or the weight is wrong"
            )


def group_scales(subject: Subject) -> Iterator[Finding]:
    """Weights of fewer than 8 bits have all their tensors, of the right shape."""
    for each in subject.low.values():
        if each.scale not in subject.tensors:
            what = "packed weight without scales: the engine's own are never filled"
            yield Finding("silent", "missing-scale", each.codes, what, each.scale)
            continue
        dtype, shape = subject.tensors[each.scale]
        try:
            expected = each.storage.signatures(each.storage.shape(subject.tensors[each.codes][1]))[1]
        except BlockscaleError as error:
            yield Finding("error", "scale-shape", each.codes, str(error))
            continue
        if shape != expected[1]:
            what = "scales do not fit the groups"
            yield Finding("error", "scale-shape", each.scale, what, str(list(expected[1])), str(list(shape)))
        if dtype != expected[0] and (dtype not in _CAST or expected[0] == "U8"):
            what = "scales have a dtype that is cast to other values"
            yield Finding("silent", "scale-dtype", each.scale, what, expected[0], dtype)
