"""Which tensors of a quantized checkpoint are to blame: faults, what each lost, and what that costs.

Three looks are put together:
- the files' headers, config and scales (`checkpoint.inspect`): the classic mistakes;
- every FP8 weight against its source (`weights.py`): noise, outliers, and whether scales belong to codes;
- the model with one quantized module at a time (`sensitivity.py`): what each does to the KL divergence.
Tensors with a fault come first, then those that cost the most. The recipe keeps the costliest that have no
fault: a fault is repaired by quantizing again, not by keeping more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from blockscale.checkpoint.compare import Side, open_side
from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.inspect import inspect_checkpoint
from blockscale.checkpoint.names import role_of, sharing_groups
from blockscale.checkpoint.problems import Problem
from blockscale.checkpoint.source import open_source
from blockscale.checkpoint.strips import dtype_of
from blockscale.errors import BlockscaleError
from blockscale.evaluate.loading import Loading, load_transformers
from blockscale.evaluate.sensitivity import Sensitivity, sensitivities
from blockscale.evaluate.weights import WeightReport, report_weight
from blockscale.formats import HIGH_PRECISION, module_path

_SHARE_OF_KL = 0.5  # that the recipe is to save
_SHARE_OF_BYTES = 0.1  # of the FP8 weights that it may keep


@dataclass(frozen=True)
class TensorDiagnosis:
    """One FP8 weight.

    Attributes:
        name: full name.
        role: as in recipes.
        nbytes: of its codes.
        weight: what quantization did to it; None if its scale or source cannot be used, as `problems` say.
        problems: what headers, config and scales show.
        cost: of the module that it is in, or None if that was not measured; fused experts are one module.
    """

    name: str
    role: str
    nbytes: int
    weight: WeightReport | None
    problems: tuple[str, ...]
    cost: Sensitivity | None = None

    @property
    def at_fault(self) -> bool:
        """Whether something is wrong beyond rounding."""
        return bool(self.problems) or (self.weight is not None and self.weight.fault is not None)


@dataclass(frozen=True)
class Diagnosis:
    """All FP8 weights, the worst first.

    Attributes:
        problems: of the checkpoint as a whole.
        tensors: ranked.
        keep: patterns for `exclude` of a recipe that keeps the costliest tensors in high precision.
        saved: share of the summed KL divergence that these cost.
    """

    problems: tuple[Problem, ...]
    tensors: tuple[TensorDiagnosis, ...]
    keep: tuple[str, ...]
    saved: float


def diagnose_weights(
    model: str, reference: str, on_tensor: Callable[[int], None] = lambda total: None
) -> tuple[tuple[Problem, ...], list[TensorDiagnosis]]:
    """Problems of a checkpoint, and every FP8 weight of it against its source.

    Args:
        model: FP8 checkpoint: folder, Hub repository id or fsspec URL.
        reference: the checkpoint that it was made from.
        on_tensor: is told, after every weight, how many there are.

    Raises:
        BlockscaleError: no checkpoint there, or a reference whose tensors are other ones.
    """
    problems = inspect_checkpoint(model).problems
    side, other = open_side(model), open_side(reference)
    entries = [entry for entry in side.index.tensors.values() if entry.dtype == FP8]
    found = []
    for entry in entries:
        said = tuple(str(each.message) for each in problems if _about(each, entry))
        report, reason = _report(entry, side, other)
        said += (reason,) if reason and not said else ()
        found.append(TensorDiagnosis(entry.name, role_of(entry.name), entry.nbytes, report, said))
        on_tensor(len(entries))
    names = set(side.index.tensors)
    general = tuple(
        each
        for each in problems
        if each.where not in names and not any(_about(each, entry) for entry in entries)
    )
    return general, found


def rank(
    problems: tuple[Problem, ...], tensors: Iterable[TensorDiagnosis], costs: Iterable[Sensitivity] = ()
) -> Diagnosis:
    """Put together what was found; tensors with a fault first, then by what they cost, then by noise."""
    known = {each.name: each for each in costs}
    joined = [_with_cost(tensor, known) for tensor in tensors]

    def order(tensor: TensorDiagnosis) -> tuple[bool, float, float]:
        noise = tensor.weight.sqnr_db if tensor.weight is not None else -math.inf
        return not tensor.at_fault, -tensor.cost.kl if tensor.cost is not None else 0.0, noise

    joined.sort(key=order)
    keep, saved = _keep(joined)
    return Diagnosis(problems, tuple(joined), keep, saved)


def measure_costs(
    model: str,
    reference: str,
    ids: torch.Tensor,
    on_module: Callable[[Sensitivity, int], None] = lambda cost, total: None,
) -> list[Sensitivity]:
    """What each FP8 layer of a checkpoint alone does to its reference's predictions, on transformers.

    Args:
        model: quantized checkpoint.
        reference: the checkpoint that it was made from.
        ids: int64 (B, T), what the models read.
        on_module: is told every result, and how many there will be.

    Raises:
        BlockscaleError: a checkpoint that cannot be loaded, or whose layers are not those of the reference.
    """
    from blockscale.huggingface.modules import quantized_modules

    loading = Loading("transformers", dtype=torch.float32)
    exact, quantized = (load_transformers(open_source(spec), loading) for spec in (reference, model))
    layers = dict(quantized_modules(quantized))
    return sensitivities(exact, layers, ids, lambda cost: on_module(cost, len(layers)))


def _about(problem: Problem, entry: TensorEntry) -> bool:
    """Whether a problem is one of this weight or of its scale."""
    return problem.where == entry.name or problem.where.startswith(f"{entry.name}_scale")


def _report(entry: TensorEntry, side: Side, other: Side) -> tuple[WeightReport | None, str | None]:
    """The report of a weight, or why there is none."""
    twin = other.index.tensors.get(entry.name)
    if twin is None or twin.shape != entry.shape or twin.dtype not in HIGH_PRECISION:
        got = "nothing" if twin is None else f"{twin.dtype} {list(twin.shape)}"
        raise BlockscaleError(
            "reference is not what the model was made from",
            where=entry.name,
            expected=f"{list(entry.shape)} in high precision",
            got=got,
        )
    try:
        scale, block = side.scale(entry), side.stored_block(entry)
        calibrated = entry.name in side.calibrated
        codes, source = _read(entry, side), _read(twin, other)
        return report_weight(codes, scale, source, block, calibrated=calibrated), None
    except BlockscaleError as error:
        return None, str(error)


def _read(entry: TensorEntry, side: Side) -> torch.Tensor:
    raw = bytearray(side.source.read(entry.file, entry.start, entry.nbytes))
    return torch.frombuffer(raw, dtype=dtype_of(entry)).view(entry.shape)


def _with_cost(tensor: TensorDiagnosis, costs: dict[str, Sensitivity]) -> TensorDiagnosis:
    """The tensor with what the module it is in costs, fused experts included."""
    path = module_path(tensor.name)
    while path and path not in costs:
        path = path.rpartition(".")[0]
    if not path:
        return tensor
    return replace(tensor, cost=costs[path])


def _keep(tensors: list[TensorDiagnosis]) -> tuple[tuple[str, ...], float]:
    """Modules for a recipe to leave alone, with those fused with them, and the share of KL they cost."""
    fine = {each.name: each for each in tensors if each.cost is not None and not each.at_fault}
    total = sum(cost.kl for cost in _costs(fine.values()))
    room = _SHARE_OF_BYTES * sum(tensor.nbytes for tensor in tensors)
    groups = {name: group for group in sharing_groups(fine) for name in group}
    kept: dict[str, TensorDiagnosis] = {}
    for name in fine:
        group = {member: fine[member] for member in groups.get(name, (name,))}
        size = sum(tensor.nbytes for tensor in group.values())
        enough = sum(cost.kl for cost in _costs(kept.values())) >= _SHARE_OF_KL * total
        if name not in kept and not enough and size <= room:
            kept |= group
            room -= size
    saved = sum(cost.kl for cost in _costs(kept.values()))
    return tuple(module_path(name) for name in kept), saved / total if total else 0.0


def _costs(tensors: Iterable[TensorDiagnosis]) -> set[Sensitivity]:
    """Of all modules that these tensors are in, each once."""
    return {tensor.cost for tensor in tensors if tensor.cost is not None}
