"""How large a checkpoint becomes, by role and per GPU, from headers or from config.json alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from blockscale.checkpoint.decide import FP8, Signature, decide_quantize
from blockscale.checkpoint.families import family_of, mtp_prefixes, stored_block_size
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.model_config import parse_config, read_config, without_quantization
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.shapes import parameters_of
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from blockscale.formats import scale_shape, tensor_nbytes

# Every GPU of a tensor-parallel group holds these whole; MLA's latent projections have no heads to split.
_REPLICATED_ROLES = ("norm", "router", "bias", "other")
_REPLICATED_LINEARS = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")


@dataclass(frozen=True)
class Parallelism:
    """GPUs: `tensor` splits attention, dense layers and embeddings, `expert` splits the experts."""

    tensor: int = 1
    expert: int | None = None

    def __post_init__(self) -> None:
        if self.tensor < 1 or (self.expert is not None and self.expert < 1):
            raise BlockscaleError(
                "parallel sizes must be positive", got=f"TP {self.tensor}, EP {self.expert}"
            )

    def share(self, name: str) -> int:
        """Over how many GPUs a tensor is split."""
        role = role_of(name)
        if role in _REPLICATED_ROLES or name.endswith(_REPLICATED_LINEARS):
            return 1
        return (self.expert or self.tensor) if role == "experts" else self.tensor


@dataclass(frozen=True)
class RoleSize:
    """Bytes of one role before and after, and how many of its tensors are quantized."""

    role: str
    tensors: int
    quantized: int
    before: int
    after: int


@dataclass(frozen=True)
class SizePlan:
    """What quantizing does to the size of a checkpoint.

    Attributes:
        roles: largest first; scales count with their weight.
        before, after: tensor bytes (headers not counted).
        mtp_after: the part of `after` that belongs to multi-token prediction modules.
        parameters: elements of the unquantized checkpoint.
        per_gpu: bytes of weights on one GPU for `parallelism`; KV cache and activations come on top.
        kept: reason -> tensors that stay as they are.
        seconds: estimate at `rate` bytes of input per second, or None without a rate.
    """

    source: str
    model_type: str
    roles: tuple[RoleSize, ...]
    before: int
    after: int
    mtp_after: int
    parameters: int
    parallelism: Parallelism
    per_gpu: int
    kept: dict[str, int]
    rate: float | None
    seconds: float | None
    warnings: tuple[str, ...]


def plan_checkpoint(
    src: str | os.PathLike[str] | dict[str, Any],
    recipe: Recipe | None = None,
    *,
    parallelism: Parallelism | None = None,
    rate: float | None = None,
    revision: str | None = None,
) -> SizePlan:
    """Plan the sizes of a quantized checkpoint.

    Args:
        src: checkpoint folder, Hub id or URL (its headers are read); or a config.json, as path or parsed.
        recipe: as for `quantize_checkpoint`.
        parallelism: GPUs to plan the memory of; one by default.
        rate: bytes of input per second that the conversion is expected to run at.
        revision: of a Hub repository.

    Raises:
        BlockscaleError: nothing there, quantized already, or a config.json of a family whose shapes are
            unknown.
    """
    recipe, parallelism = recipe or Recipe(), parallelism or Parallelism()
    config, tensors, label = _read(src, revision)
    decisions = decide_quantize(tensors, config, recipe)
    family, prefixes = family_of(config), mtp_prefixes(config)
    roles: dict[str, list[int]] = {}
    kept: dict[str, int] = {}
    per_gpu = mtp_after = 0
    for name, (dtype, shape) in tensors.items():
        decision = decisions.by_name[name]
        before = after = tensor_nbytes(dtype, shape)
        if decision.action == "quantize":
            grid = scale_shape(shape, stored_block_size(recipe.block_size, shape, family))
            after = tensor_nbytes(FP8, shape) + tensor_nbytes("F32", grid)
        else:
            kept[decision.reason] = kept.get(decision.reason, 0) + 1
        total = roles.setdefault(role_of(name), [0, 0, 0, 0])
        for place, value in enumerate((1, decision.action == "quantize", before, after)):
            total[place] += value
        mtp_after += after if name.startswith(prefixes) else 0
        per_gpu += -(-after // parallelism.share(name))
    sizes = tuple(
        RoleSize(role, *total) for role, total in sorted(roles.items(), key=lambda item: -item[1][2])
    )
    before = sum(size.before for size in sizes)
    return SizePlan(
        source=label,
        model_type=str(config.get("model_type")),
        roles=sizes,
        before=before,
        after=sum(size.after for size in sizes),
        mtp_after=mtp_after,
        parameters=sum(tensor_nbytes("U8", shape) for _, shape in tensors.values()),
        parallelism=parallelism,
        per_gpu=per_gpu,
        kept=dict(sorted(kept.items(), key=lambda item: -item[1])),
        rate=rate,
        seconds=before / rate if rate else None,
        warnings=decisions.warnings,
    )


def _read(
    src: str | os.PathLike[str] | dict[str, Any], revision: str | None
) -> tuple[dict[str, Any], dict[str, Signature], str]:
    # A bare config plans the model it describes; DeepSeek publishes only the one of its FP8 checkpoint.
    if isinstance(src, dict):
        config, label = without_quantization(src), "config"
        return config, parameters_of(config), label
    label = os.fspath(src)
    if os.path.isfile(label):
        folder, name = os.path.split(os.path.abspath(label))
        config = parse_config(open_source(folder).read(name), label)
        config = without_quantization(config)
        return config, parameters_of(config), label
    source = open_source(label, revision)
    return read_config(source), signatures(read_index(source)), source.spec
