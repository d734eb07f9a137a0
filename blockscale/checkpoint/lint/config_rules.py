"""What config.json says of the quantization, and whether the engine takes it."""

from __future__ import annotations

from collections.abc import Iterator

from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.lint.finding import Finding, Severity
from blockscale.checkpoint.lint.subject import Subject
from blockscale.formats import HIGH_PRECISION, spell_block_size

# What `quant_method` an engine knows, of those that are checked here.
_METHODS = {
    "vllm": ("fp8", "compressed-tensors"),
    "sglang": ("fp8", "compressed-tensors", "w4afp8"),
    "transformers": ("fp8", "compressed-tensors"),
}
_CHECKED = ("fp8", "compressed-tensors", "w4afp8", "blockscale")


def known_method(subject: Subject) -> Iterator[Finding]:
    """The engine has to know the method; layouts of this package alone it does not."""
    method, known = subject.method, _METHODS[subject.engine]
    if not subject.entry or method in known:
        return
    if method not in _CHECKED:
        what = "the quantization method is not checked here"
        yield Finding(
            "warning", "method", "config.json", what, " | ".join(known), method or "no quant_method"
        )
        return
    here = subject.engine == "transformers" and method == "blockscale"
    remedy = "load it with blockscale.huggingface" if here else "quantize with a --layout it knows"
    what = f"{subject.engine} does not know the quantization method"
    yield Finding("error", "method", "config.json", what, " | ".join(known), method, remedy)


def readable(subject: Subject) -> Iterator[Finding]:
    """Scales of blocks need a block size; what engines know and this package does not is not checked."""
    if subject.unreadable is None or subject.method not in _CHECKED:
        return
    blocks = any(
        name.endswith("_scale_inv") and len(shape) > 1 for name, (_, shape) in subject.tensors.items()
    )
    if blocks or subject.method == "blockscale":
        yield Finding("error", "config", "config.json", subject.unreadable)
    else:
        what = f"scales and shapes are not checked here: {subject.unreadable}"
        yield Finding("warning", "config", "config.json", what)


def declared(subject: Subject) -> Iterator[Finding]:
    """Quantized tensors need a `quantization_config`, and the other way round."""
    codes = [
        n for n, (dtype, shape) in subject.tensors.items() if len(shape) > 1 and dtype not in HIGH_PRECISION
    ]
    fp8 = [name for name in codes if subject.tensors[name][0] == FP8]
    if fp8 and not subject.entry:
        what = f"{len(fp8)} FP8 tensors and no quantization_config: codes are taken for weights"
        remedy = "restore the quantization_config of config.json"
        yield Finding("silent", "declared", "config.json", what, remedy=remedy)
    if subject.entry and not codes and subject.method in _CHECKED:
        what = "stale quantization_config: no tensor is quantized, and the engine looks for scales"
        remedy = "remove it from config.json"
        yield Finding("silent", "stale", "config.json", what, got=subject.method, remedy=remedy)


def activation_scheme(subject: Subject) -> Iterator[Finding]:
    """vLLM and SGLang ask for it, and quantize inputs of blocks as they come."""
    if subject.method != "fp8":
        return
    scheme, where = subject.entry.get("activation_scheme"), "config.json activation_scheme"
    if scheme is None and subject.engine != "transformers":
        remedy = 'set it to "dynamic"'
        yield Finding("error", "activation-scheme", where, "is missing", "dynamic", remedy=remedy)
    elif scheme not in (None, "dynamic"):
        what = "weights in blocks take inputs that are quantized as they come"
        yield Finding("error", "activation-scheme", where, what, "dynamic", repr(scheme))


def scale_format(subject: Subject) -> Iterator[Finding]:
    """transformers takes "float" and "ue8m0" alone; the others ignore what they do not know."""
    if subject.method not in ("fp8", "w4afp8") or "scale_fmt" not in subject.entry:
        return
    value, where = subject.entry["scale_fmt"], "config.json scale_fmt"
    if value == "ue8m0" or (value == "float" and subject.engine == "transformers"):
        return
    severity: Severity = "error" if subject.engine == "transformers" else "warning"
    remedy = "write ue8m0, or leave the key out for float32"
    yield Finding(
        severity, "scale-fmt", where, "is no format that the engine knows", "ue8m0", repr(value), remedy
    )


def block_size(subject: Subject) -> Iterator[Finding]:
    """The fast kernels of vLLM and SGLang have blocks of 128x128."""
    if subject.quantization is None or subject.engine == "transformers" or not subject.of_kind("FP8"):
        return
    for size in subject.quantization.block_sizes:
        if size != (128, 128):
            what = f"{subject.engine} is known to run blocks of 128x128 alone"
            got, remedy = spell_block_size(size), "quantize with --block-size 128x128"
            yield Finding("warning", "block-size", "config.json", what, "128x128", got, remedy)


def w4afp8_block_size(subject: Subject) -> Iterator[Finding]:
    """SGLang's W4AFp8Config sets 128x128 whatever config.json says."""
    size = subject.entry.get("weight_block_size", [128, 128])
    if subject.method == "w4afp8" and size != [128, 128]:
        what = "SGLang takes blocks of 128x128 whatever config.json says"
        yield Finding("silent", "block-size", "config.json weight_block_size", what, "[128, 128]", repr(size))


def mixed_precision(subject: Subject) -> Iterator[Finding]:
    """SGLang reads the format of the whole and not those of the groups."""
    if subject.method == "compressed-tensors" and subject.entry.get("format") == "mixed-precision":
        what = "SGLang reads one format for the whole model and finds no scheme for mixed precision"
        yield Finding(
            *("error", "mixed-precision", "config.json format", what),
            *("float-quantized or pack-quantized", "mixed-precision", "quantize with --layout w4afp8"),
        )
