"""What a model has beside its linear layers, the experts of w4afp8, and the index."""

from __future__ import annotations

from collections.abc import Iterator

from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.group_storage import is_expert
from blockscale.checkpoint.lint.finding import Finding
from blockscale.checkpoint.lint.subject import Subject
from blockscale.checkpoint.names import role_of

_HIGH = ("embedding", "head", "norm", "router", "mtp_projection", "vision")


def kept_roles(subject: Subject) -> Iterator[Finding]:
    """Embeddings, heads, routers and the like have no quantized layer to go to."""
    for name, (dtype, _) in subject.tensors.items():
        role = role_of(name) if dtype == FP8 or name in subject.low else "other"
        if role in _HIGH:
            what = f"{role} is quantized, and {subject.engine} has no quantized layer for it"
            yield Finding("error", "role", name, what, "BF16", dtype, "leave it unquantized")


def mtp_layer(subject: Subject) -> Iterator[Finding]:
    """A config that promises multi-token prediction needs the tensors of it."""
    count, layers = (subject.config.get(key) for key in ("num_nextn_predict_layers", "num_hidden_layers"))
    if not isinstance(count, int) or not isinstance(layers, int):
        return
    for number in range(layers, layers + count):
        if not any(f".layers.{number}." in name for name in subject.tensors):
            what = "the multi-token prediction layer is missing: speculative decoding drafts nonsense"
            remedy = "set num_nextn_predict_layers to 0, or keep the layer"
            yield Finding("warning", "mtp", f"model.layers.{number}", what, remedy=remedy)


def w4afp8_experts(subject: Subject) -> Iterator[Finding]:
    """SGLang's W4AFp8MoEMethod runs all routed experts, INT4 in groups of 128."""
    if subject.method != "w4afp8":
        return
    for each in subject.linears:
        if not is_expert(each.name):
            continue
        if each.stored not in subject.low:
            what = "SGLang's w4afp8 takes every routed expert for packed INT4"
            yield Finding("error", "w4afp8", each.stored, what, "I8", subject.tensors[each.stored][0])
            continue
        scale = f"{each.module}.input_scale"
        if scale not in subject.tensors:
            what = "input scale is missing: SGLang takes 1.0, and inputs beyond 448 saturate"
            yield Finding("warning", "w4afp8", each.stored, what, scale)
        elif subject.tensors[scale][0] != "BF16":
            what = "SGLang compares w1's input scale, rounded to BF16, with w3's, and refuses a difference"
            yield Finding("warning", "w4afp8", scale, what, "BF16", subject.tensors[scale][0])
        elif subject.tensors[scale][1] not in ((), (1,)):
            got = str(list(subject.tensors[scale][1]))
            yield Finding("error", "w4afp8", scale, "an expert has one input scale", "[1]", got)
