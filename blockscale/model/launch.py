"""The processes that torchrun started, as `Ranks`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from blockscale.checkpoint.lanes import usable_device
from blockscale.errors import BlockscaleError, LostRankError
from blockscale.model.ranks import Ranks, answered
from blockscale.model.watch import watched

_START = timedelta(minutes=5)  # until all have come
_TENSORS = timedelta(minutes=10)  # a rank may still be compiling kernels
# Ranks wait for one with a slow disk, and for what the user will write; not for one that is gone.
_OBJECTS = timedelta(days=365)


@contextmanager
def open_ranks(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run, each with a device; without torchrun, or with one process, one rank.

    Inside, a process that dies ends all the others, with a line on standard error and exit code 2.

    Args:
        device: "cpu", "cuda" for the GPU of LOCAL_RANK, or "auto" for a GPU where there is one.

    Raises:
        BlockscaleError: no such device, an environment that is not torchrun's, or ranks that do not come.
    """
    world = _number(os.environ, "WORLD_SIZE", 1)
    if world < 2:
        yield Ranks(device=torch.device(usable_device(device)))
        return
    ranks = _joined(world, _number(os.environ, "RANK"))
    with ranks.together():
        place = _own_device(device)
    ranks.check_same({"kind of device": place.type})
    backend = "nccl" if place.type == "cuda" else "gloo"
    group = answered(dist.new_group, backend=backend, timeout=_TENSORS)
    with watched(ranks, os.environ["MASTER_ADDR"]) as watch:
        try:
            yield replace(ranks, group=group, device=place)
        except LostRankError:
            watch.tell()
            raise
        if place.type == "cuda":
            torch.cuda.synchronize(place)  # others may still read what this rank sends
        ranks.wait()
    gc.collect()  # NCCL does not end before the last CUDA graph that it is in
    dist.destroy_process_group()


def _joined(world: int, rank: int) -> Ranks:
    """One of the ranks, which can tell others objects."""
    try:
        dist.init_process_group("gloo", timeout=_START)
        return Ranks(rank, world, objects=dist.new_group(backend="gloo", timeout=_OBJECTS))
    except (RuntimeError, ValueError) as error:
        raise BlockscaleError(
            f"the {world} ranks of this run do not come together",
            got=str(error).splitlines()[0],
            remedy="start them with torchrun, on machines that reach each other",
        ) from error


def _own_device(device: str) -> torch.device:
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device(usable_device(device))
    local, count = _number(os.environ, "LOCAL_RANK"), torch.cuda.device_count()
    if local >= count:
        raise BlockscaleError(
            "no GPU for this process",
            where=f"local rank {local}",
            expected="one process a GPU",
            got=f"{count} GPUs",
            remedy=f"start torchrun with --nproc-per-node {count}, or use --device cpu",
        )
    torch.cuda.set_device(local)  # kernels are launched on the current one
    return torch.device(usable_device(device), local)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as error:
        raise BlockscaleError(
            "is not a number",
            where=f"environment variable {name}",
            got=repr(text),
            remedy="start the run with torchrun, which sets it",
        ) from error
