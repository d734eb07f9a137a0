"""`blockscale train`: a checkpoint and a text in, a checkpoint out that was trained through its rounding.

    loss = mean KL(teacher || model)       with a teacher to distill from
           mean -log p(next token)         without

Each step reads a batch of windows (`reading`), adds up the gradients of micro-batches, clips their norm and
moves the weights (`optimizer`). While it works everything lies in `OUT.training/`: a lock, the lines of
`history.jsonl`, and the last save (`saved`), from which the same command goes on after a kill, to the same
losses. At the end the weights are exported to OUT and the folder goes away.

The loss and the norm of the gradient are looked at before weights move: where one is NaN or Inf the run
stops, weights as they were, and says where it began.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockscale.checkpoint.convert import RunOptions
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from blockscale.model.ranks import ONE, Ranks
from blockscale.model.text import Tokenizer
from blockscale.qat.arithmetic import (
    Arithmetic,
    arithmetic_of,
    first_not_finite,
    keep_routers_exact,
    narrow_experts,
)
from blockscale.qat.checking import check, check_windows
from blockscale.qat.exporting import export, export_unquantized, round_kept
from blockscale.qat.gradients import Gradients, Objective
from blockscale.qat.history import Check, History, Step, TrainingResult
from blockscale.qat.loading import check_context, freeze, load, load_teacher
from blockscale.qat.optimizer import fill_moments, make_optimizer, rate_at, set_rate, whole_moments
from blockscale.qat.preparation import prepare
from blockscale.qat.reading import Place, Reading
from blockscale.qat.request import RunLimits, Training
from blockscale.qat.saved import Saved, newest, save
from blockscale.qat.sharding import fill_state, shard, whole, whole_state
from blockscale.qat.workplace import check_same, workplace

WORK = ".training"
_HISTORY = "history.jsonl"
_EXPORTED = torch.bfloat16  # dtype of what is not quantized


@dataclass
class _State:
    """All that a run works with."""

    training: Training
    limits: RunLimits
    ranks: Ranks
    objective: Objective
    gradients: Gradients
    optimizer: torch.optim.AdamW
    reading: Reading
    checked: list[torch.Tensor]
    history: History
    reference: Check | None = None
    done: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def model(self) -> Any:
        """What is trained."""
        return self.objective.model


def train(
    training: Training,
    out: Path,
    limits: RunLimits | None = None,
    *,
    ranks: Ranks = ONE,
    on_entry: Callable[[Step | Check], None] = lambda entry: None,
) -> TrainingResult:
    """Train, and write the trained checkpoint.

    Args:
        training: what.
        out: folder for the checkpoint.
        limits: how.
        ranks: processes that share it, all with the same arguments.
        on_entry: is told every step and check.

    Raises:
        BlockscaleError: a model, text, recipe or option that cannot be used; an interrupted run where none is
            to be resumed, or one of other options; a loss or gradient that is not finite; a full disk.
    """
    limits = limits or RunLimits()
    begun = time.monotonic()
    work = out.with_name(out.name + WORK)
    with workplace(work, out, limits, ranks) as saved:
        if saved is not None:
            check_same(saved, training)
        state = _prepare(training, limits, ranks, work, saved)
        try:
            _loop(state, work, on_entry)
        finally:
            state.reading.close()
        _export(state, out)
        history = state.history
    return TrainingResult(
        training.spelled(),
        str(out),
        tuple(history.steps),
        tuple(history.checks),
        state.reference,
        time.monotonic() - begun,
    )


def _prepare(training: Training, limits: RunLimits, ranks: Ranks, work: Path, saved: Saved | None) -> _State:
    source = open_source(training.model)
    tokenizer = Tokenizer(training.model)
    arithmetic = arithmetic_of(ranks.device, training.qat.compute)
    _check_rows(training, limits, ranks)
    checked = check_windows(training, tokenizer)
    model = load(source, torch.float32, ranks)
    check_context(model, training)
    freeze(model, training)
    if training.qat.compute != torch.float32:
        keep_routers_exact(model)
    teacher = None if training.distill is None else load_teacher(training, ranks)
    reference = _reference(model, checked, arithmetic, ranks, saved)
    if training.recipe is not None:
        prepare(model, training.recipe, training.qat, initial=None if saved else training.initial)
    if training.qat.compute != torch.float32:
        narrow_experts(model, ranks.device)
    if limits.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    shard(model, ranks)
    objective = Objective(model, teacher, arithmetic, limits.micro_batch)
    # Neither collectives nor layers that are computed twice are captured.
    captures = ranks.device.type == "cuda" and ranks.world == 1 and not limits.checkpointing
    gradients = Gradients(objective.backward, model.parameters(), captures)
    optimizer = make_optimizer(model, training.lr, training.scale_lr, training.weight_decay)
    rows = range(ranks.rank, training.batch, ranks.world)
    places, history = None, History(work / _HISTORY if ranks.rank == 0 else None)
    if saved is not None:
        fill_state(model, saved.model())
        fill_moments(model, optimizer, saved.optimizer(), saved.step)
        places = [Place(*saved.facts["places"][row]) for row in rows]
        if ranks.rank == 0:
            history = History.read(work / _HISTORY, saved.step)
    reading = Reading(training.data, tokenizer.encode_pieces, rows, training.batch, training.context, places)
    return _State(
        training,
        limits,
        ranks,
        objective,
        gradients,
        optimizer,
        reading,
        checked,
        history,
        reference,
        0 if saved is None else saved.step,
    )


def _check_rows(training: Training, limits: RunLimits, ranks: Ranks) -> None:
    own, rest = divmod(training.batch, ranks.world)
    if rest:
        expected = f"a multiple of the {ranks.world} processes"
        raise BlockscaleError("cannot be shared evenly", where="batch", expected=expected, got=training.batch)
    if limits.micro_batch is not None and (limits.micro_batch < 1 or own % limits.micro_batch):
        expected = f"a divisor of the {own} sequences of a process"
        raise BlockscaleError("does not fit", where="micro_batch", expected=expected, got=limits.micro_batch)


def _reference(
    model: nn.Module, checked: list[torch.Tensor], arithmetic: Arithmetic, ranks: Ranks, saved: Saved | None
) -> Check | None:
    """The model as it came, on the text of the checks."""
    if not checked:
        return None
    if saved is not None:
        return Check(**saved.facts["reference"])
    return check(model, checked, arithmetic, ranks, 0)


def _loop(state: _State, work: Path, on_entry: Callable[[Step | Check], None]) -> None:
    """Train until all steps are done."""
    training, limits = state.training, state.limits

    def note(entry: Step | Check) -> None:
        state.history.add(entry)
        on_entry(entry)

    def measure() -> None:
        if state.checked:
            note(check(state.model, state.checked, state.objective.arithmetic, state.ranks, state.done))

    if not state.done:
        measure()
    state.model.train()
    while state.done < training.steps:
        note(_step(state, work))
        last = state.done == training.steps
        if last:
            round_kept(state.model, _EXPORTED)
        if last or state.done % limits.check_every == 0:
            measure()
        if last or state.done % limits.save_every == 0:
            _save(state, work)


def _step(state: _State, work: Path) -> Step:
    """One update of the weights; none where something is not finite."""
    training, optimizer = state.training, state.optimizer
    warmup = round(training.warmup * training.steps)
    set_rate(optimizer, rate_at(state.done, training.steps, warmup))
    ids = state.reading.next().to(state.ranks.device)
    loss = state.gradients(ids)
    norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), training.clip))
    mean = state.ranks.all_reduce(loss) / state.ranks.world
    found, size = torch.stack([mean, norm]).tolist()
    if not (math.isfinite(found) and math.isfinite(size)):
        first = first_not_finite(state.model, state.objective.predicted, state.objective.parts(ids))
        raise _not_finite(f"at step {state.done + 1}: loss {found:g}", first, work)
    optimizer.step()
    state.gradients.clear()
    state.done += 1
    rate = optimizer.param_groups[0]["lr"]
    return Step(state.done, found, rate, size, time.monotonic() - state.begun)


def _not_finite(when: str, where: str, work: Path) -> BlockscaleError:
    """What to say of a step that would spoil the weights, or has."""
    there = newest(work)
    kept = "no save was made before" if there is None else f"{there.folder} is kept"
    return BlockscaleError(
        f"training is not finite {when}; {kept}",
        where=where,
        expected="finite numbers",
        remedy="train with a lower --lr",
    )


def _save(state: _State, work: Path) -> None:
    """Save this step.

    Raises:
        BlockscaleError: an update made weights NaN or Inf, which no later run could repair.
    """
    model = whole_state(state.model)
    spoiled = next((name for name, each in model.items() if not bool(each.isfinite().all())), None)
    if spoiled is not None:
        raise _not_finite(f"after step {state.done}", spoiled, work)
    moments = whole_moments(state.model, state.optimizer)
    places = _by_row(state.ranks.gather(state.reading.places))
    with state.ranks.together():
        if state.ranks.rank == 0:
            facts: Mapping[str, Any] = {
                "training": state.training.spelled(),
                "places": places,
                "reference": state.reference and asdict(state.reference),
            }
            save(work, state.done, model, moments, facts)


def _by_row(places: list[list[Place]]) -> list[Place]:
    """Of each process its rows' -> of all rows; row r belongs to process r mod the number of processes."""
    return [each for row in zip(*places, strict=True) for each in row]


def _export(state: _State, out: Path) -> None:
    weights = whole_state(state.model)
    with state.ranks.together():
        if state.ranks.rank:
            return
        state.model.eval()
        # Of a run that is resumed nothing can be there but what its export had begun.
        run = RunOptions(overwrite=state.limits.overwrite or state.limits.resume)
        given: dict[str, Any] = {"files": state.training.model, "state_dict": weights}
        if state.training.recipe is None:
            export_unquantized(state.model, out, dtype=_EXPORTED, **given)
        else:
            masters = state.limits.masters
            export(state.model, out, masters=masters, dtype=_EXPORTED, run=run, **given)
