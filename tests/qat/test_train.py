"""The trainer: what it writes, that it goes on after a kill to the same losses, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from blockscale import BlockscaleError, verify_checkpoint
from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.recipe import read_recipe
from blockscale.model.text import Tokenizer
from blockscale.qat import Check, QatOptions, RunLimits, Step, train
from blockscale.qat import training as module
from blockscale.qat.reading import Reading
from blockscale.qat.saved import newest
from tests import data
from tests.processes import ROOT, torchrun
from tests.qat.jobs import INT3, make_source, make_text, training
from tests.qat.models import checkpoints


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("train") / "llama")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("train") / "deepseek_v3", "deepseek_v3")


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """A mixture of experts with a multi-token prediction layer.

    Of a seed with which nothing lies so near a border of rounding or routing that the order of sums decides:
    of other seeds losses of two processes agree to 1e-7 too, until such a value has gone the other way.
    """
    return make_source(tmp_path_factory.mktemp("train") / "mtp", "mtp", seed=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("train") / "text.txt")


def losses(result):
    return [each.loss for each in result.steps]


def work_of(out):
    return out.with_name(out.name + module.WORK)


class Stopped(Exception):
    """What ends a run in the middle."""


def stop_after(step):
    def on_entry(entry):
        if isinstance(entry, Step) and entry.step == step:
            raise Stopped

    return on_entry


def test_the_result_is_a_checkpoint_that_verifies_and_the_rounding_costs_less(source, text, tmp_path):
    seen = []
    limits = RunLimits(masters=tmp_path / "masters", check_every=10, save_every=10)
    job = training(source, text, steps=20, lr=3e-3)
    result = train(job, tmp_path / "out", limits, on_entry=seen.append)
    assert verify_checkpoint(tmp_path / "out", tmp_path / "masters").ok
    assert seen == [
        result.checks[0],
        *result.steps[:10],
        result.checks[1],
        *result.steps[10:],
        result.checks[2],
    ]
    assert [each.step for each in result.checks] == [0, 10, 20]
    assert sum(losses(result)[-5:]) < 0.7 * sum(losses(result)[:5])
    assert not work_of(tmp_path / "out").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    rates = [each.learning_rate for each in result.steps]
    assert max(rates) == pytest.approx(job.lr)
    assert rates[-1] < 0.02 * job.lr


def test_the_trained_model_predicts_what_the_training_last_checked(source, text, tmp_path):
    from blockscale.evaluate.run import Text, evaluate

    job = training(source, text)
    result = train(job, tmp_path / "out")
    windows = Text(str(text), context=job.context, limit=job.check_windows)
    found = evaluate(str(tmp_path / "out"), windows, reference=str(source))
    assert found.scores.perplexity.value == pytest.approx(result.checks[-1].perplexity, rel=1e-5)
    assert found.scores.against.perplexity.value == pytest.approx(result.reference.perplexity, rel=1e-5)


@pytest.mark.parametrize("scales", ["dynamic", "learned"])
def test_interrupted_between_saves_it_goes_on_to_the_same_losses_and_bytes(source, text, tmp_path, scales):
    job = training(source, text, qat=QatOptions(scales))
    whole = train(job, tmp_path / "whole", RunLimits(save_every=2, check_every=2))
    with pytest.raises(Stopped):
        train(job, tmp_path / "cut", RunLimits(save_every=2, check_every=2), on_entry=stop_after(5))
    assert not (tmp_path / "cut").exists()
    assert newest(work_of(tmp_path / "cut")).step == 4
    resumed = train(job, tmp_path / "cut", RunLimits(save_every=2, check_every=2, resume=True))
    assert losses(resumed) == losses(whole)
    assert resumed.checks == whole.checks
    assert resumed.reference == whole.reference
    found, expected = (data.read(tmp_path / name) for name in ("cut", "whole"))
    assert all(
        torch.equal(found[name].view(torch.uint8), each.view(torch.uint8)) for name, each in expected.items()
    )


def test_killed_it_goes_on_from_the_command_line(source, text, tmp_path, monkeypatch, blockscale):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    command = [
        *("train", source, text, "--recipe", "int3.json", "--out", out, "--max-steps", 6, "--batch", 4),
        *("--context", 16, "--save-every", 2, "--lr", 1e-3, "--device", "cpu", "--json"),
    ]
    (tmp_path / "int3.json").write_text(
        json.dumps({"layout": "blockscale", "precision": {"default": "int3:g64"}})
    )
    killed = subprocess.run(
        [sys.executable, "-m", "tests.qat.dying", "5", *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest(work_of(out)).step == 4
    resumed = told(blockscale(*command, "--resume"))
    job = training(
        source, text, distill=None, check_data=None, lr=1e-3, recipe=read_recipe(tmp_path / "int3.json")
    )
    assert losses_of(resumed) == losses(train(job, tmp_path / "whole"))


def told(ended):
    """What a command that went well has said in JSON."""
    code, out, err = ended
    assert code == 0, err
    return json.loads(out)


def losses_of(said):
    return [each["loss"] for each in said["steps"]]


def test_two_processes_train_as_one_does(drafting, text, tmp_path, blockscale):
    recipe = tmp_path / "w4a8.json"
    recipe.write_text(
        json.dumps({"layout": "blockscale", "precision": {"default": "fp8", "experts": "int4:g32"}})
    )
    command = [
        *("train", drafting, text, "--recipe", recipe, "--max-steps", 4, "--batch", 4, "--context", 16),
        *("--lr", 1e-3, "--scales", "learned", "--eval-data", text, "--eval-windows", 3, "--eval-every", 2),
        *("--save-every", 2, "--device", "cpu", "--json"),
    ]
    double = torchrun("-m", "blockscale", *command, "--out", tmp_path / "two")
    two = told((double.returncode, double.stdout, double.stderr))
    one = told(blockscale(*command, "--out", tmp_path / "one"))
    # Sums of gradients are in another order.
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    for found, expected in zip(two["checks"], one["checks"], strict=True):
        assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert two["reference"]["nll"] == pytest.approx(one["reference"]["nll"], rel=1e-6)
    found, expected = (data.read(tmp_path / name) for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        if each.dtype == torch.uint8:  # few codes lie so near a border that another order moves them
            assert (found[name] != each).float().mean() < 0.01, name
        elif each.is_floating_point() and each.dtype != torch.float8_e4m3fn:
            torch.testing.assert_close(found[name], each, rtol=2**-7, atol=1e-5)


def test_routers_stay_as_they_are_unless_they_are_to_train(mixture, text, tmp_path):
    before = data.read(mixture)
    routers = [name for name in before if ".mlp.gate." in name]
    assert routers
    for name, changes in (("kept", False), ("trained", True)):
        train(training(mixture, text, steps=2, train_router=changes), tmp_path / name)
        after = data.read(tmp_path / name)
        same = {each: torch.equal(after[each].float(), before[each].float()) for each in routers}
        biases = [each for each in routers if each.endswith("correction_bias")]
        assert all(same[each] for each in biases)
        assert all(same[each] != changes for each in routers if each not in biases)


def test_without_a_recipe_the_model_trains_as_it_is(source, text, tmp_path):
    result = train(training(source, text, recipe=None, distill=None), tmp_path / "out")
    assert losses(result)[-1] < losses(result)[0]
    assert all(each.dtype == torch.bfloat16 for each in data.read(tmp_path / "out").values())
    assert "quantization_config" not in data.read_config(tmp_path / "out")
    assert checkpoints.plain(tmp_path / "out").config.vocab_size == 320


def test_gradient_checkpointing_and_micro_batches_change_nothing_but_the_order_of_sums(
    mixture, text, tmp_path
):
    job = training(mixture, text, steps=3)
    plain = train(job, tmp_path / "plain")
    for name, limits in (("again", RunLimits(checkpointing=True)), ("parts", RunLimits(micro_batch=2))):
        assert losses(train(job, tmp_path / name, limits)) == pytest.approx(losses(plain), rel=1e-5)


def test_it_begins_with_the_codes_of_a_calibrated_checkpoint(source, text, tmp_path):
    checks = {}
    for name in ("own", "other"):
        initial = tmp_path / name
        quantize_checkpoint(source, initial, INT3)
        if name == "other":
            weights = data.read(initial)
            moved = {
                key: each.flip(0).contiguous()
                if key.endswith(".weight") and each.dtype == torch.uint8
                else each
                for key, each in weights.items()
            }
            save_file(moved, initial / "model.safetensors", {"format": "pt"})
        job = training(source, text, qat=QatOptions("frozen"), initial=str(initial), steps=1)
        checks[name] = train(job, tmp_path / f"from {name}").checks[0]
    plain = train(training(source, text, steps=1), tmp_path / "plain").checks[0]
    assert checks["own"] == plain
    assert checks["other"].nll != plain.nll


def test_a_loss_that_is_not_finite_stops_before_the_weights_move_and_names_the_layer(source, text, tmp_path):
    broken = make_source(tmp_path / "broken")
    weights = data.read(broken)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(BlockscaleError, match=r"layers\.1\.mlp\.up_proj.*not finite at step 1.*no save"):
        train(training(broken, text, distill=None, check_data=None), tmp_path / "out")


def test_a_training_that_diverges_keeps_the_last_save_that_was_finite(source, text, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def spoil(self, *arguments):
        step(self, *arguments)
        if len(spoiled) == 3:
            self.param_groups[0]["params"][0].data[0, 0] = float("inf")
        spoiled.append(1)

    spoiled = []
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(BlockscaleError, match=r"not finite after step 4; .*step-2 is kept"):
        train(training(source, text), tmp_path / "out", RunLimits(save_every=2))
    monkeypatch.undo()
    saved = newest(work_of(tmp_path / "out"))
    assert saved.step == 2
    assert all(bool(each.isfinite().all()) for each in saved.model().values())
    assert len(train(training(source, text), tmp_path / "out", RunLimits(resume=True)).steps) == 6


def test_not_only_the_first_sequence_of_a_batch_is_looked_at(mixture, text, tmp_path):
    job = training(mixture, text, distill=None, check_data=None)
    reading = Reading(job.data, Tokenizer(mixture).encode_pieces, range(job.batch), job.batch, job.context)
    first, *others = (set(row) for row in reading.next().tolist())
    reading.close()
    broken = make_source(tmp_path / "broken", "deepseek_v3")
    weights = data.read(broken)
    weights["model.embed_tokens.weight"][min(set.union(*others) - first)] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(BlockscaleError, match=r"embed_tokens: training is not finite at step 1"):
        train(training(broken, text, distill=None, check_data=None), tmp_path / "out")


def test_killed_in_its_export_a_training_goes_on_with_that(source, text, tmp_path, monkeypatch):
    def begin(model, dst, *, masters, **_):
        (dst / ".blockscale").mkdir(parents=True)
        (dst / ".blockscale" / "journal.jsonl").write_text("")
        masters.mkdir()
        (masters / "config.json").write_text("{}")
        raise Stopped

    limits = {"masters": tmp_path / "masters"}
    monkeypatch.setattr(module, "export", begin)
    with pytest.raises(Stopped):
        train(training(source, text), tmp_path / "out", RunLimits(**limits))
    monkeypatch.undo()
    result = train(training(source, text), tmp_path / "out", RunLimits(**limits, resume=True))
    assert len(result.steps) == 6
    assert verify_checkpoint(tmp_path / "out", tmp_path / "masters").ok


def test_a_place_for_masters_that_is_taken_is_refused_before_the_training(source, text, tmp_path):
    (tmp_path / "masters").mkdir()
    (tmp_path / "masters" / "mine").write_text("")
    with pytest.raises(BlockscaleError, match=r"masters: holds files already"):
        train(
            training(source, text), tmp_path / "out", RunLimits(masters=tmp_path / "masters"), on_entry=print
        )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": 2e-3}, "lr"),
        ({"batch": 8}, "batch"),
        ({"qat": QatOptions("frozen")}, "qat"),
        ({"steps": 9}, "steps"),
    ],
)
def test_resuming_with_other_options_is_refused_by_name(source, text, tmp_path, changes, name):
    with pytest.raises(Stopped):
        train(training(source, text), tmp_path / "out", RunLimits(save_every=2), on_entry=stop_after(3))
    with pytest.raises(BlockscaleError, match=rf"^{name} differs|: {name} differs"):
        train(training(source, text, **changes), tmp_path / "out", RunLimits(resume=True))


def test_an_interrupted_training_is_neither_lost_nor_mistaken(source, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BlockscaleError, match="nothing to resume"):
        train(training(source, text), out, RunLimits(resume=True))
    with pytest.raises(Stopped):
        train(training(source, text), out, RunLimits(save_every=2), on_entry=stop_after(3))
    with pytest.raises(BlockscaleError, match=r"saved after step 2.*--resume.*--overwrite"):
        train(training(source, text), out)
    assert newest(work_of(out)).step == 2
    assert len(train(training(source, text, steps=2), out, RunLimits(overwrite=True)).steps) == 2
    with pytest.raises(BlockscaleError, match="holds files already"):
        train(training(source, text), out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": INT3.__class__(include=("nothing.*",))}, "nothing"),
        ({"freeze": ("model.layers.0.*",)}, "frozen"),
        ({"freeze": ("no.such.*",)}, "matches no tensor"),
        ({"context": 5000}, "longer than the model's context"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_written(source, text, tmp_path, changes, message):
    with pytest.raises(BlockscaleError, match=message):
        train(training(source, text, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"steps": 0}, "steps"),
        ({"warmup": 2.0}, "warmup"),
    ],
)
def test_numbers_out_of_range_are_refused(source, text, changes, message):
    with pytest.raises(BlockscaleError, match=message):
        training(source, text, **changes)


def test_a_quantized_model_is_refused_with_what_to_do(source, text, tmp_path):
    quantize_checkpoint(source, tmp_path / "fp8")
    with pytest.raises(BlockscaleError, match=r"quantized already.*dequantize.*--initial"):
        train(training(tmp_path / "fp8", text), tmp_path / "out")


def test_checks_are_of_the_windows_that_were_asked_for(source, text, tmp_path):
    one, two = (
        train(training(source, text, steps=1, check_windows=count), tmp_path / str(count)).checks[0]
        for count in (1, 2)
    )
    assert isinstance(one, Check)
    assert math.isnan(one.standard_error)  # of one window there is none
    assert two.standard_error > 0
