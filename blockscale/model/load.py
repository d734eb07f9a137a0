"""From a checkpoint folder to a model that runs."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import Literal

import torch

from blockscale.checkpoint.group_storage import activations_note
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.index import TensorEntry, read_index
from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.model_config import CONFIG_NAME, parse_config
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.precision import AS_STORED, Precision, check_followed
from blockscale.checkpoint.ranks import read_rank_index, world_size_of
from blockscale.checkpoint.source import Source, open_source
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8, spell_block_size
from blockscale.group_spelling import spell_group_format
from blockscale.model.architecture import ModelConfig
from blockscale.model.config import from_huggingface, load_config
from blockscale.model.linear import Compute
from blockscale.model.ranks import Ranks
from blockscale.model.slices import share
from blockscale.model.store import Files, Store
from blockscale.model.transformer import Transformer
from blockscale.model.weights import Weights
from blockscale.ops.gemm_dispatch import has_fp8

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Settings:
    """What a model is made by, the same on all ranks.

    Attributes:
        config: with the precision that linear layers are to have.
        activations: their dtype.
        divided_for: how many ranks the files were divided for, None for Hugging Face's.
        commit: of a Hub repository.
    """

    config: ModelConfig
    activations: torch.dtype
    compute: Compute
    on_missing_scale: Literal["error", "keep"]
    mtp: bool
    divided_for: int | None
    commit: str | None

    def facts(self) -> dict[str, str]:
        """All of it by name, to be compared."""
        values = {**dict(self.config), **vars(self)}
        del values["config"]
        stored = values.pop("stored")  # scale format and block size are fields of their own
        values |= {"layout": stored and stored.layout, "low": stored and stored.low}
        return {name: str(value) for name, value in values.items()}


def load_model(
    path: str | os.PathLike[str] | Source,
    *,
    config: ModelConfig | str | os.PathLike[str] | None = None,
    device: str | Ranks = "auto",
    dtype: torch.dtype = torch.bfloat16,
    compute: Compute | None = None,
    on_missing_scale: Literal["error", "keep"] = "error",
    precision: Precision | None = None,
    mtp: bool = False,
) -> Transformer:
    """Read a checkpoint of the DeepSeek-V2/V3 architecture, quantized or not.

    It is Hugging Face's, of which each of several ranks reads its part, or one that `blockscale convert` has
    divided for as many ranks.

    Args:
        path: local folder, Hub repository id (`org/name[@revision]`) or fsspec URL; or what `open_source`
            made of one.
        config: instead of the folder's config.json: a file, or what was read of one.
        device: "cpu", "cuda" for the current GPU, or "auto" for a GPU that is there; or the ranks of several
            processes, all of which call this with the same arguments.
        dtype: of activations and of weights that are not FP8; bfloat16 or float32.
        compute: "fp8" multiplies quantized weights with quantized activations, "high" with activations as
            they are. Default "fp8" on GPUs that have FP8 arithmetic, else "high", said in the log. Where
            config.json says that weights alone are quantized, it is "high" in any case.
        on_missing_scale: refuse an FP8 weight without a scale, or use its values as they are and say so.
        precision: what linear layers are quantized or dequantized to as they are read; counts before the
            config's.
        mtp: read the multi-token prediction layer too, with which `generate` writes up to two tokens a step.

    Raises:
        BlockscaleError: a config or checkpoint that is damaged, or not of this architecture; a precision that
            cannot be given; `mtp` without such a layer; ranks that read different things. If one rank raises
            it, all do.
    """
    ranks = device if isinstance(device, Ranks) else Ranks(device=torch.device(usable_device(device)))
    place = ranks.device
    with ranks.together():
        source = path if isinstance(path, Source) else open_source(path)
        model_config = _config(source, config, precision or AS_STORED)
        settings = _Settings(
            model_config,
            dtype,
            _compute(model_config, compute, place),
            on_missing_scale,
            mtp,
            world_size_of(source),
            source.root if source.pinned else None,
        )
    ranks.check_same(settings.facts())
    settings = ranks.broadcast(settings)
    with ranks.together():
        weights = _weights(source, settings, ranks)
    _check_precision(settings.config.precision, weights)
    with ranks.together():
        model = Transformer(settings.config, weights, mtp=mtp)
    ranks.check_same(_formats(weights.store))
    whose = f"rank {ranks.rank} of {ranks.world}: " if ranks.world > 1 else ""
    note = activations_note(settings.config.stored, settings.compute == "fp8")
    _logger.info("%s%s%s", whose, weights.summary(), note)
    if ranks.rank == 0 and compute is None and weights.has_fp8 and not has_fp8(place):
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
        _logger.warning("%s has no FP8 arithmetic: products run on dequantized weights", name)
    return model


def _weights(source: Source, settings: _Settings, ranks: Ranks) -> Weights:
    """The tensors that this rank reads, none of which is read yet."""
    config = settings.config
    if settings.divided_for is not None:
        tensors = read_rank_index(source, ranks.rank, ranks.world).tensors
    else:
        tensors = _without_others(read_index(source).tensors, config, ranks)
    found = {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}
    low = low_bit_weights(found, config.stored).values()
    return Weights(
        Store(tensors, Files(source).bytes_of, divided=settings.divided_for is not None),
        device=ranks.device,
        dtype=settings.activations,
        fmt=BlockFP8(config.weight_block_size or (128, 128), config.scale_fmt),
        compute=settings.compute,
        on_missing_scale=settings.on_missing_scale,
        precision=config.precision,
        ranks=ranks,
        low={each.name: each for each in low},
    )


def _without_others(
    tensors: dict[str, TensorEntry], config: ModelConfig, ranks: Ranks
) -> dict[str, TensorEntry]:
    """Without the routed experts of other ranks."""
    if ranks.world == 1 or not config.n_routed_experts:
        return tensors
    config.check_ranks(ranks.world)
    own = share(config.n_routed_experts, ranks).indices
    found = {name: _EXPERT.search(name) for name in tensors}
    others = {name for name, match in found.items() if match is not None and int(match[1]) not in own}
    return {name: entry for name, entry in tensors.items() if name not in others}


def _formats(store: Store) -> dict[str, str]:
    """How the tensors that were read are stored, by name; experts, of which every rank has others, as one."""
    return {_EXPERT.sub(".experts.*.", name): store.tensors[name].dtype for name in sorted(store.read)}


def _config(
    source: Source, given: ModelConfig | str | os.PathLike[str] | None, precision: Precision
) -> ModelConfig:
    """The config that counts, with the precision that linear layers are to have."""
    own = _own_config(source)
    config = load_config(given, own) if isinstance(given, (str, os.PathLike)) else given
    if config is None and own is None:
        raise BlockscaleError(
            "no config", where=source.spec, expected=CONFIG_NAME, remedy="name a config file"
        )
    if config is not None and own is not None:
        _check_agreement(config, own, source.spec)
    config = config or own
    assert config is not None
    # How weights are stored, the checkpoint's own config says.
    stored = own.stored if own is not None else config.stored
    return config.model_copy(update={"precision": precision.over(config.precision), "stored": stored})


def _compute(config: ModelConfig, wanted: Compute | None, place: torch.device) -> Compute:
    if config.stored is not None and config.stored.weights_only:
        return "high"
    return wanted or ("fp8" if has_fp8(place) else "high")


def _own_config(source: Source) -> ModelConfig | None:
    if not source.exists(CONFIG_NAME):
        return None
    where = source.path(CONFIG_NAME)
    return from_huggingface(parse_config(source.read(CONFIG_NAME), where), where=where)


def _check_precision(precision: Precision, weights: Weights) -> None:
    if not precision.entries:
        return
    usual = weights.fmt.block_size
    for group in precision.groups:
        raise BlockscaleError(
            "this runtime makes FP8 and BF16 as it loads",
            where=f"precision {spell_group_format(group)}",
            expected="fp8 | bf16",
        )
    for other in precision.block_sizes - {usual}:
        expected, got = spell_block_size(usual), spell_block_size(other)
        raise BlockscaleError("a model has one block size", where="precision", expected=expected, got=got)
    # A rank knows the names of its own experts only.
    everywhere = weights.ranks.gather(weights.names())
    names = dict.fromkeys(name for each in everywhere for name in each)

    def reason(name: str) -> str | None:
        wanted = precision.precision_of(name)
        return None if wanted == "fp8" else "set to bf16" if wanted else role_of(name)

    check_followed(precision, names, reason)


def _check_agreement(given: ModelConfig, own: ModelConfig, where: str) -> None:
    """Refuse a config that names other quantization parameters than the checkpoint's own."""
    if own.dtype != "fp8":
        return
    for name in ("scale_fmt", "weight_block_size"):
        ours, theirs = getattr(given, name), getattr(own, name)
        if ours != theirs:
            raise BlockscaleError(
                f"{name} of the given config is not that of the checkpoint",
                where=where,
                expected=f"{theirs}, as its {CONFIG_NAME} says",
                got=ours,
                remedy=f"correct the given config, or leave it out to use {CONFIG_NAME}",
            )
