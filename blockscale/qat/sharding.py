"""A model that several processes train together: FSDP2, a shard of every parameter each.

Layers are sharded one by one, so that a process holds one whole layer at a time beside its shards. Parameters
are gathered in their own dtype: the rounding has to see the numbers that are exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from blockscale.errors import BlockscaleError
from blockscale.model.ranks import Ranks


def shard(model: Any, ranks: Ranks) -> None:
    """Shard a model of transformers over the ranks, in place; one rank keeps it as it is.

    Raises:
        BlockscaleError: a PyTorch without torch.distributed.
    """
    if ranks.world == 1:
        return
    try:
        from torch.distributed import DeviceMesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise BlockscaleError("several processes need torch.distributed", got=error) from error
    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers, as transformers says which modules are not to be divided."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may have a shard; all of them must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into one of which this process may have a shard."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
    target.copy_(value)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> whole tensor on the CPU of all that `state_dict` has, tied ones once."""
    return {name: whole(each).cpu() for name, each in _state(model)}


def fill_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set what `whole_state` gave."""
    for name, each in _state(model):
        fill(each, state[name])


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    stored = model.state_dict(keep_vars=True).keys()
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if name in stored:
            yield name, each.detach()
