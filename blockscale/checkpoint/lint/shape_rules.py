"""Shapes: what an engine's kernels and its ways to cut a layer over ranks can take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from blockscale.checkpoint.lint.finding import Finding
from blockscale.checkpoint.lint.subject import Linear, Subject
from blockscale.checkpoint.names import role_of, sharing_groups
from blockscale.errors import BlockscaleError
from blockscale.formats import scale_shape

# Layers that are cut by columns (inputs); the others by rows, but for those that every rank has whole.
_BY_INPUTS = ("o_proj", "out_proj", "down_proj", "w2", "wo")
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "wq_b", "wk", "weights_proj")
_MERGED = ("q_proj", "k_proj", "gate_proj", "w1", "q_a_proj", "in_proj_qkv")  # all but the last of each


def block_of(subject: Subject, each: Linear) -> tuple[int, int] | None:
    """The block size of an FP8 weight; None where config.json does not say."""
    try:
        return None if subject.quantization is None else subject.quantization.block_size_of(each.name)
    except BlockscaleError:
        return None


def ragged_grid(subject: Subject) -> Iterator[Finding]:
    """Where transformers dequantizes, the grid tells it the block size: 576 rows fail, 192 are wrong."""
    if subject.method != "fp8":
        return
    for each in subject.of_kind("FP8"):
        block = block_of(subject, each)
        if block is None or len(each.shape) != 2:
            continue
        grid = scale_shape(each.shape, block)
        ragged = [
            (size, cells, side)
            for size, cells, side in zip(each.shape, grid, block, strict=True)
            if size % side and cells > 1
        ]
        if not ragged:
            continue
        fails = any(size % cells for size, cells, _ in ragged)
        what = "transformers derives the block size from the scale grid where it dequantizes (without a GPU)"
        what += ": it raises" if fails else ": its blocks are not those of the weight"
        expected = f"multiples of {block[0]}x{block[1]}, or a single block"
        remedy = "load it with blockscale.huggingface, or dequantize it first"
        yield Finding(
            "error" if fails else "silent",
            "ragged",
            each.stored,
            what,
            expected,
            str(list(each.shape)),
            remedy,
        )


def activation_groups(subject: Subject) -> Iterator[Finding]:
    """compressed-tensors quantizes inputs in groups that have to divide them."""
    if subject.method != "compressed-tensors":
        return
    for each in subject.of_kind("FP8"):
        block = block_of(subject, each)
        if block is not None and role_of(each.name) != "experts" and each.shape[-1] % block[1]:
            what = "the compressed-tensors package quantizes inputs in whole groups: the first forward fails"
            expected, remedy = f"a multiple of {block[1]} inputs", "use --layout deepseek, or exclude it"
            yield Finding("error", "ragged", each.stored, what, expected, str(each.shape[-1]), remedy)


def merged_precision(subject: Subject) -> Iterator[Finding]:
    """Weights that the engine runs as one layer have one format."""
    by_name = {each.name: each for each in subject.linears}
    for group in sharing_groups(by_name):
        if subject.engine == "transformers" and role_of(group[0]) != "experts":
            continue
        usual = Counter(by_name[name].kind for name in group).most_common(1)[0][0]
        odd = next((name for name in group if by_name[name].kind != usual), None)
        blocks = {block_of(subject, by_name[name]) for name in group if by_name[name].kind == "FP8"}
        if odd is not None:
            other = next(name for name in group if by_name[name].kind == usual)
            what = (
                f"is {by_name[odd].kind} but {other} is {usual}; {subject.engine} runs the two as one layer"
            )
            yield Finding("error", "merged-precision", odd, what, remedy="give all of them one precision")
        elif len(blocks) > 1:
            what = f"weights that {subject.engine} runs as one layer have several block sizes"
            yield Finding("error", "merged-precision", group[0], what)


def merged_rows(subject: Subject) -> Iterator[Finding]:
    """In a merged layer every part but the last has whole blocks: or the next would begin within one."""
    parts = {name for group in sharing_groups(each.name for each in subject.linears) for name in group}
    for each in subject.of_kind("FP8"):
        block = block_of(subject, each)
        leaf = each.module.rpartition(".")[2]
        if block is None or each.name not in parts or leaf not in _MERGED or len(each.shape) != 2:
            continue
        rows = each.shape[0] // (1 if leaf in _WHOLE else math.gcd(subject.tp, each.shape[0]))
        if rows % block[0]:
            what = f"is merged with the rows of another weight by {subject.engine}"
            expected = f"a multiple of {block[0]} rows on every rank"
            yield Finding(
                "error", "merged-rows", each.stored, what, expected, str(rows), "exclude the whole layer"
            )


def tensor_parallel(subject: Subject) -> Iterator[Finding]:
    """Every rank has whole blocks and groups of the dimension that is cut."""
    if subject.tp == 1:
        return
    for each in subject.linears:
        leaf = each.module.rpartition(".")[2]
        if not each.quantized or leaf in _WHOLE or len(each.shape) != 2:
            continue
        axis = 1 if leaf in _BY_INPUTS else 0
        unit = _unit(subject, each, axis)
        share, rest = divmod(each.shape[axis], subject.tp)
        if unit is not None and (rest or share % unit):
            named = ("rows", "inputs")[axis]
            what = f"cannot be cut over {subject.tp} ranks at a block"
            expected = f"a multiple of {unit * subject.tp} {named}"
            remedy = (
                "use fewer ranks, or expert parallelism"
                if role_of(each.name) == "experts"
                else "use fewer ranks"
            )
            yield Finding(
                "error", "tensor-parallel", each.stored, what, expected, str(each.shape[axis]), remedy
            )


def _unit(subject: Subject, each: Linear, axis: int) -> int | None:
    if each.kind == "FP8":
        block = block_of(subject, each)
        return None if block is None else block[axis]
    own = subject.low.get(each.stored)
    return None if own is None else own.fmt.group_size if axis else 1


def w4a8_kernels(subject: Subject) -> Iterator[Finding]:
    """vLLM's W4A8 kernels: Hopper, groups of 128; experts of multiples of 256, others of 128."""
    found = [each for each in subject.of_kind("int4:g128") if len(each.shape) == 2]
    if subject.method != "compressed-tensors" or not found or not _with_activations(subject):
        return
    what = "INT4 with FP8 activations runs on Hopper GPUs alone (compute capability 9.0)"
    yield Finding("warning", "w4a8", "config.json", what, got=f"{len(found)} weights")
    for each in found:
        multiple = 256 if role_of(each.name) == "experts" else 128
        axis = 1 if each.module.endswith(_BY_INPUTS) else 0
        sizes = [size // (subject.tp if place == axis else 1) for place, size in enumerate(each.shape)]
        if any(size % multiple for size in sizes):
            told = f"vLLM's W4A8 kernels take multiples of {multiple} on every rank"
            remedy = "use int4:g64, which vLLM runs with BF16 activations"
            yield Finding("error", "w4a8", each.stored, told, got=" x ".join(map(str, sizes)), remedy=remedy)


def _with_activations(subject: Subject) -> bool:
    groups = subject.entry.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    return any(
        isinstance(each, dict) and each.get("input_activations") and each.get("format") == "pack-quantized"
        for each in schemes
    )


def three_bits(subject: Subject) -> Iterator[Finding]:
    """vLLM has no kernels for 3 bits."""
    found = [each for each in subject.linears if each.kind.startswith("int3")]
    if subject.method == "compressed-tensors" and found:
        what = "vLLM packs 4 or 8 bits and finds no scheme for these"
        yield Finding("error", "bits", found[0].stored, what, "int4", found[0].kind, "use int4")
