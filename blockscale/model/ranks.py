"""The processes that share a model, one device each, and what they tell each other.

`all_reduce` and `all_gather` are for tensors: NCCL on GPUs, where nothing waits for the host and CUDA graphs
can hold them, gloo on the CPU. The rest is for a few objects, always through gloo. One process alone does
nothing. `launch.open_ranks` makes `Ranks` of what torchrun says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from blockscale.errors import BlockscaleError, LostRankError

T = TypeVar("T")
_CPU = torch.device("cpu")
_NAMED = 4  # values that differ, of which a message names this many
# Called so since PyTorch 2.13.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """One of the processes.

    Attributes:
        rank: which one, counted from 0.
        world: how many there are.
        group: through which tensors go.
        objects: through which everything else goes.
        device: that this process has.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    objects: dist.ProcessGroup | None = None
    device: torch.device = _CPU

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place, the same bits everywhere.

        Raises:
            LostRankError: a rank is gone, or does not answer; so do the other methods.
        """
        if self.world > 1:
            answered(dist.all_reduce, x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """(T, columns of this rank) -> the columns of all ranks side by side, the same bits everywhere.

        Args:
            x: this rank's.
            widths: how many columns each rank has.
        """
        if self.world == 1:
            return x
        rows, room = x.shape[0], max(widths)
        x = F.pad(x, (0, room - x.shape[1])).contiguous()
        parts = x.new_empty(self.world * rows, room)
        answered(_gather_single, parts, x, group=self.group)
        return torch.cat([part[:, :width] for part, width in zip(parts.split(rows), widths, strict=True)], -1)

    def broadcast(self, value: T) -> T:
        """What rank 0 has."""
        if self.world == 1:
            return value
        box = [value]
        answered(dist.broadcast_object_list, box, group=self.objects, group_src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What each rank has."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        answered(dist.all_gather_object, values, value, group=self.objects)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do or none: an error of one inside is raised by all, which end at the same place.

        Nothing inside may wait for other ranks.

        Raises:
            BlockscaleError: what another rank raised, in one line that says which one.
        """
        if self.world == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            known = isinstance(error, BlockscaleError)
            told = self._failure(str(error) if known else f"{type(error).__name__}: {error}")
            if known and told is not None:
                raise told from error
            raise
        told = self._failure(None)
        if told is not None:
            raise told

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Refuse to go on if ranks have different values of one name, or one has none.

        Raises:
            BlockscaleError: the same on all ranks: the first names that differ, and every rank's value.
        """
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if len(set(self.gather(digest))) == 1:
            return
        everywhere = self.gather(dict(facts))
        names = list(dict.fromkeys(name for each in everywhere for name in each))
        differ = [name for name in names if len({each.get(name) for each in everywhere}) > 1]
        named = "; ".join(f"{name} is {_by_rank(name, everywhere)}" for name in differ[:_NAMED])
        more = f"; {len(differ) - _NAMED} more differ" if len(differ) > _NAMED else ""
        raise BlockscaleError(
            f"ranks disagree: {named}{more}",
            remedy="give every rank the same checkpoint, config and options",
        )

    def _failure(self, line: str | None) -> BlockscaleError | None:
        """What all ranks raise, if one has a line to tell."""
        lines = self.gather(line)
        failed = [rank for rank, each in enumerate(lines) if each is not None]
        if not failed:
            return None
        first = lines[failed[0]]
        if len(failed) == self.world and len(set(lines)) == 1:
            return BlockscaleError(str(first))
        if len(failed) > 1:
            return BlockscaleError(f"ranks {', '.join(map(str, failed))} have failed, the first one: {first}")
        return BlockscaleError(f"rank {failed[0]} has failed: {first}")


ONE = Ranks()


def _by_rank(name: str, everywhere: Sequence[Mapping[str, str]]) -> str:
    """`float32 on rank 0, ue8m0 on rank 1, 2`."""
    ranks: dict[str | None, list[str]] = {}
    for rank, each in enumerate(everywhere):
        ranks.setdefault(each.get(name), []).append(str(rank))
    return ", ".join(
        f"{'missing' if value is None else value} on rank {', '.join(of)}" for value, of in ranks.items()
    )


def answered(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a collective call returns.

    Raises:
        LostRankError: PyTorch raises RuntimeError for whatever happens to another rank.
    """
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:
        raise LostRankError(
            "another rank is gone or does not answer",
            got=(str(error) or type(error).__name__).splitlines()[0],
            remedy="see what it has said",
        ) from error
