"""The skip list of a quantized checkpoint: full module paths of what stays unquantized, as engines look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blockscale.checkpoint.names import role_of
from blockscale.formats import HIGH_PRECISION, module_path

# Of a tensor: safetensors dtype and shape.
Signature = tuple[str, tuple[int, ...]]


def skip_list(kept: Iterable[str], tensors: Mapping[str, Signature]) -> tuple[str, ...]:
    """The entries, sorted, for the tensors that are kept of all those of a checkpoint."""
    skip = {entry for name in kept if (entry := skip_entry(name, tensors[name])) is not None}
    if "lm_head.weight" not in tensors:
        # Tied to the embedding: the module exists in every engine though the file has no tensor for it.
        skip.add("lm_head")
    return tuple(sorted(skip))


def skip_entry(name: str, signature: Signature) -> str | None:
    """Full module path by which a skip list names an unquantized linear weight or fused experts, or None."""
    dtype, shape = signature
    if dtype not in HIGH_PRECISION:
        return None
    if len(shape) == 3 and not name.endswith((".weight", "bias")):
        return name.rpartition(".")[0]
    linear = name.endswith(".weight") and len(shape) == 2 and role_of(name) not in ("embedding", "norm")
    return module_path(name) if linear else None
