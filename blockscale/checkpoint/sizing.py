"""How large a checkpoint becomes, by role and per GPU, from headers or from config.json alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from blockscale.checkpoint.block_choice import BlockChoice, Chosen
from blockscale.checkpoint.block_measure import choose_blocks
from blockscale.checkpoint.decide import FP8, Decisions, Signature, decide_quantize
from blockscale.checkpoint.families import Family, family_of, mtp_prefixes
from blockscale.checkpoint.group_storage import group_storage
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.model_config import parse_config, read_config, without_quantization
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.plan import plan_quantize, signatures
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.recipe import AUTO, Recipe
from blockscale.checkpoint.shapes import parameters_of
from blockscale.checkpoint.source import Source, open_source
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
        block_sizes: size -> how many FP8 weights have it.
        group_formats: format of fewer than 8 bits -> how many weights have it.
        block_choice: under the block size "auto", what was chosen for each weight and why.
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
    block_sizes: dict[str, int]
    group_formats: dict[str, int]
    block_choice: dict[str, Chosen] | None


def plan_checkpoint(
    src: str | os.PathLike[str] | dict[str, Any],
    recipe: Recipe | None = None,
    *,
    parallelism: Parallelism | None = None,
    rate: float | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> SizePlan:
    """Plan the sizes of a quantized checkpoint. Nothing is loaded, unless block sizes are to be chosen.

    Args:
        src: checkpoint folder, Hub id or URL (its headers are read, under the block size "auto" all its
            linear weights); or a config.json, as path or parsed.
        recipe: as for `quantize_checkpoint`.
        parallelism: GPUs to plan the memory of; one by default.
        rate: bytes of input per second that the conversion is expected to run at.
        revision: of a Hub repository.
        progress: told of what is read to choose block sizes.

    Raises:
        BlockscaleError: nothing there, quantized already, a config.json of a family whose shapes are unknown,
            or one alone where block sizes are to be chosen by the values of the weights.
    """
    recipe, parallelism = recipe or Recipe(), parallelism or Parallelism()
    config, tensors, label, source = read_shapes(src, revision)
    choice = _choice(source, recipe, progress)
    decisions = decide_quantize(tensors, config, recipe, chosen=None if choice is None else choice.sizes)
    family, prefixes = family_of(config), mtp_prefixes(config)
    roles: dict[str, list[int]] = {}
    kept: dict[str, int] = {}
    per_gpu = mtp_after = 0
    for name, (dtype, shape) in tensors.items():
        decision = decisions.by_name[name]
        before = after = tensor_nbytes(dtype, shape)
        if decision.action == "quantize":
            after = _quantized_bytes(decisions, name, shape, family)
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
        block_sizes=decisions.block_sizes,
        group_formats=decisions.group_formats,
        block_choice=None if choice is None else choice.tensors,
    )


def _quantized_bytes(decisions: Decisions, name: str, shape: tuple[int, ...], family: Family) -> int:
    group = decisions.by_name[name].group
    if group is not None:
        assert decisions.quantization is not None
        return group_storage(decisions.quantization.layout, group).nbytes(name, shape)
    grid = scale_shape(shape, decisions.stored_block_size(name, shape, family))
    return tensor_nbytes(FP8, shape) + tensor_nbytes("F32", grid)


def _choice(source: Source | None, recipe: Recipe, progress: Progress | None) -> BlockChoice | None:
    if recipe.block_size != AUTO:
        return None
    if source is None:
        raise BlockscaleError(
            "block sizes are chosen by the values of the weights",
            where=f"block size {AUTO}",
            expected="a checkpoint",
            got="config.json alone",
        )
    return choose_blocks(plan_quantize(source, recipe), source, recipe, progress=progress)


def read_shapes(
    src: str | os.PathLike[str] | dict[str, Any], revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Signature], str, Source | None]:
    """config, name -> (dtype, shape), what to call it, and the checkpoint, if it is more than a config."""
    # A bare config plans the model it describes; DeepSeek publishes only the one of its FP8 checkpoint.
    if isinstance(src, dict):
        config, label = without_quantization(src), "config"
        return config, parameters_of(config), label, None
    label = os.fspath(src)
    if os.path.isfile(label):
        folder, name = os.path.split(os.path.abspath(label))
        config = parse_config(open_source(folder).read(name), label)
        config = without_quantization(config)
        return config, parameters_of(config), label, None
    source = open_source(label, revision)
    return read_config(source), signatures(read_index(source)), source.spec, source
