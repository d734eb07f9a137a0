"""What has one format: weights that engines fuse share it, and all the routed experts of a layer do.

A unit is a set of tensors of the checkpoint, and the modules of the model that they are in. A unit that the
model of transformers does not have (a multi-token prediction layer) cannot change its predictions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from blockscale.checkpoint.decide import Signature
from blockscale.checkpoint.families import Family
from blockscale.checkpoint.names import Role, role_of, sharing_groups
from blockscale.formats import module_path, tensor_nbytes
from blockscale.search.candidates import Candidate


@dataclass(frozen=True)
class Unit:
    """Weights that have one format.

    Attributes:
        name: of the module they are in; of several, joined.
        role: as in recipes.
        tensors: full names in the checkpoint.
        signatures: (dtype, shape) of each.
    """

    name: str
    role: Role
    tensors: tuple[str, ...]
    signatures: tuple[Signature, ...]

    @property
    def source_bytes(self) -> int:
        """As the checkpoint has them."""
        return sum(tensor_nbytes(*signature) for signature in self.signatures)

    def nbytes(self, candidate: Candidate, family: Family) -> int:
        """In a format, scales included."""
        shapes = Counter(shape for _, shape in self.signatures)  # of hundreds of experts there are two
        return sum(candidate.nbytes(shape, family) * count for shape, count in shapes.items())

    @property
    def elements(self) -> int:
        """Weights in it."""
        return sum(tensor_nbytes("U8", shape) for _, shape in self.signatures)


def find_units(names: Sequence[str], tensors: Mapping[str, Signature]) -> tuple[Unit, ...]:
    """Units of the tensors of these names, in order.

    Args:
        names: of the linear weights that can be quantized.
        tensors: name -> (dtype, shape), of all.
    """
    group_of = {name: group for group in sharing_groups(names) for name in group}
    groups = dict.fromkeys(group_of.get(name, (name,)) for name in names)
    return tuple(
        Unit(_unit_name(group), role_of(group[0]), group, tuple(tensors[name] for name in group))
        for group in groups
    )


def modules_of(
    units: Sequence[Unit], model: nn.Module, tensors: Mapping[str, Signature]
) -> list[dict[str, dict[str, int]]]:
    """By unit: path of a module in the model -> its weight -> matrices that lie in it one below the other.

    Empty for a unit that the model does not have.

    Raises:
        BlockscaleError: transformers puts a weight together in a way that blocks cannot follow.
    """
    from blockscale.huggingface.targets import find_targets

    unit_of = {name: number for number, unit in enumerate(units) for name in unit.tensors}
    found: list[dict[str, dict[str, int]]] = [defaultdict(dict) for _ in units]
    for target in find_targets(model, tensors, unit_of.keys()):
        found[unit_of[target.sources[0]]][target.path][target.leaf] = target.parts
    return [dict(each) for each in found]


def _unit_name(tensors: Sequence[str]) -> str:
    """`model.layers.0.mlp.experts`, or `model.layers.0.mlp.gate_proj+up_proj`: the modules, joined."""
    if role_of(tensors[0]) == "experts":
        return f"{tensors[0].split('experts.')[0]}experts"
    parent, _, first = module_path(tensors[0]).rpartition(".")
    leaves = [first, *(module_path(name).rpartition(".")[2] for name in tensors[1:])]
    return f"{parent}.{'+'.join(leaves)}"
