"""Several processes that share a model: they compute what one does, agree on it first, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.errors import BlockscaleError
from blockscale.metrics import kl_divergence
from blockscale.model.ranks import Ranks
from blockscale.model.slices import share
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data
from tests.model import models, rank_worker, test_gpu
from tests.processes import torchrun

pytest.importorskip("compressed_tensors")
ROOT = Path(__file__).parent.parent.parent
WORLDS = (2, 4)
HIGH = {"compute": "high"}
# Of FP8 weights two ranks have whole blocks, four have halves of some.
ALIGNED = {
    "hidden_size": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 256,
}
SAY = "; give every rank the same checkpoint, config and options"
NORM, O_PROJ = "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"
# What ranks compute as one process does: name -> (checkpoint, options of load_model).
SAME = {
    "v3": ("v3", {}),
    "v2": ("v2", {}),
    "v3 in FP8, heads across blocks": ("v3 fp8", HIGH),
    "v2 in FP8 but for shared experts": ("v2 fp8", HIGH),
    "whole blocks": ("aligned fp8", HIGH),
    "quantized at load": (
        "aligned",
        {**HIGH, "precision": ["experts=fp8", "*.experts.9.*=fp8", "dense_mlp=fp8"]},
    ),
    "drafts": ("mtp", {"mtp": True}),
    "v2 divided": ("v2", {}),
    "whole blocks divided": ("aligned fp8", HIGH),
    "experts in INT4": ("v3 int4", HIGH),
    "experts in MXFP4, the rest in FP8": ("v2 mxfp4", HIGH),
    "experts in INT4 dequantized at load": ("v3 int4 narrow", HIGH),
    "experts as SGLang has them": ("whole w4afp8", HIGH),
    "experts as vLLM has them, some layers dequantized": ("whole compressed-tensors", HIGH),
    **({"tiny-deepseek-v3": (str(data.TINY_DEEPSEEK), {})} if data.TINY_DEEPSEEK.is_dir() else {}),
}
# Whose quantized activations differ a little, because sums over ranks do.
ACTIVATIONS = {
    "activations of FP8": ("aligned fp8", {"compute": "fp8"}),
    "activations of INT4 experts": ("v3 int4", {"compute": "fp8"}),
    "activations of MXFP4 experts, whole blocks": ("aligned mxfp4", {"compute": "fp8"}),
}
COMPUTED = {**SAME, **ACTIVATIONS}
# Precisions of checkpoints in the layout "blockscale".
LOW = {
    "v3 int4": {"experts": "int4:g128"},
    "v2 mxfp4": {"default": "fp8", "experts": "mxfp4"},
    "aligned mxfp4": {"default": "fp8", "experts": "mxfp4"},
    "v3 int4 narrow": {"experts": "int4:g32"},
}
# The same in layouts of engines.
LAYOUTS = {
    "w4afp8": {"default": "fp8", "experts": "int4:g128"},
    "compressed-tensors": {"default": "fp8", "experts": "mxfp4", "model.layers.1.mlp.experts.*": "int4:g32"},
}
# What is refused: name -> (world, a checkpoint for each rank, what every rank says).
REFUSED = {
    "scale format": (
        4,
        ["aligned fp8", "aligned fp8", "aligned float32", "aligned fp8"],
        "ranks disagree: scale_fmt is ue8m0 on rank 0, 1, 3, float32 on rank 2" + SAY,
    ),
    "format of a tensor": (
        2,
        ["aligned fp8", "aligned fp8 in part"],
        f"ranks disagree: {O_PROJ} is F8_E4M3 on rank 0, BF16 on rank 1; "
        f"{O_PROJ}_scale_inv is F32 on rank 0, missing on rank 1" + SAY,
    ),
    "a tensor is missing": (
        4,
        ["v3", "v3", "v3", "v3 without a norm"],
        f"rank 3 has failed: {NORM}: tensor is missing; does the config belong to this checkpoint?",
    ),
    "one folder divided": (
        2,
        ["aligned fp8", "aligned fp8 mp2"],
        "ranks disagree: divided_for is None on rank 0, 2 on rank 1" + SAY,
    ),
    "divided for others": (
        4,
        ["v2 mp2"] * 4,
        "{root}/v2 mp2: was converted for 2 ranks (expected 4, the ranks of this run); "
        "run it on 2 ranks, or convert it with --mp 4",
    ),
}


def make(folder, family="v3", maker=models.make, **changes):
    """A random model, stored in BF16 but for the correction bias."""

    def narrow(tensors):
        tensors.update({name: each.bfloat16() for name, each in tensors.items() if "correction" not in name})

    maker(folder, family, **changes)
    data.rewrite(folder, narrow)


def edit(source, target, change):
    tensors = data.read(source)
    change(tensors)
    data.write(target, data.Model(tensors, data.read_config(source)))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes: tensors are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of checkpoints."""
    root = tmp_path_factory.mktemp("ranks")
    # Biases count once; 323 tokens and widths of 208 and 336 do not share out evenly.
    make(root / "v3", attention_bias=True, vocab_size=323, n_shared_experts=2)
    make(root / "v2", "v2", q_lora_rank=None, tie_word_embeddings=True, intermediate_size=336)
    make(root / "mtp", maker=models.make_mtp, likely=True)
    make(root / "aligned", **ALIGNED)
    quantize_checkpoint(root / "v3", root / "v3 fp8")
    quantize_checkpoint(root / "v2", root / "v2 fp8", Recipe(exclude=["*shared_experts*"]))
    quantize_checkpoint(root / "aligned", root / "aligned fp8", Recipe(scale_fmt="ue8m0"))
    quantize_checkpoint(root / "aligned", root / "aligned float32")
    for name, precision in LOW.items():
        recipe = Recipe(layout="blockscale", precision=precision, scale_fmt="ue8m0")
        quantize_checkpoint(root / name.split()[0], root / name, recipe)
    make(root / "whole", **ALIGNED, moe_intermediate_size=128)
    for layout, precision in LAYOUTS.items():
        quantize_checkpoint(
            root / "whole", root / f"whole {layout}", Recipe(layout=layout, precision=precision)
        )
    for world in WORLDS:
        for name in ("v2", "aligned fp8"):
            shard_checkpoint(root / name, root / f"{name} mp{world}", world)
    shard_checkpoint(root / "v2", root / "v2 mp1", 1)

    def widen(tensors):
        del tensors[f"{O_PROJ}_scale_inv"]
        tensors[O_PROJ] = tensors[O_PROJ].bfloat16()

    edit(root / "aligned fp8", root / "aligned fp8 in part", widen)
    edit(root / "v3", root / "v3 without a norm", lambda tensors: tensors.pop(NORM))
    return root


def environment(rank, world, port):
    """What torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}


def start(world, *arguments):
    """The processes of one machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", rank_worker.__name__, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment(rank, world, port), text=True, **pipes)
        for rank in range(world)
    ]


def ends(processes, *, keep_open=False, timeout=250):
    """(exit code, standard error) of each; those that go on are a failure."""
    try:
        for each in () if keep_open else processes:
            each.stdin.close()
        for each in processes:
            each.wait(timeout=timeout)
        return [(each.returncode, each.stderr.read()) for each in processes]
    finally:
        for each in processes:
            each.kill()


def alone(folder, options):
    return rank_worker.computed(rank_worker.load("cpu", folder, **options))


@pytest.fixture(scope="module")
def expected(checkpoints):
    """What one process computes."""
    return {name: alone(checkpoints / folder, options) for name, (folder, options) in COMPUTED.items()}


@pytest.fixture(scope="module")
def results(checkpoints, expected, tmp_path_factory):
    """What each rank has computed, or what it says: one run of four processes, which also work as pairs.

    It comes after what one process computes, which leaves compiled kernels in the cache that they share.
    """
    jobs = {name: (world, folders, {}) for name, (world, folders, _) in REFUSED.items()}
    for name, (folder, options) in COMPUTED.items():
        for world in WORLDS:
            own = f"{folder} mp{world}" if name.endswith("divided") else folder
            jobs[f"{name} on {world}"] = world, [own] * world, options
    path = tmp_path_factory.mktemp("jobs") / "jobs"
    keys = ("world", "folders", "options")
    spelled = {
        name: (world, [str(checkpoints / each) for each in folders], options)
        for name, (world, folders, options) in jobs.items()
    }
    path.write_text(json.dumps({name: dict(zip(keys, job, strict=True)) for name, job in spelled.items()}))
    assert ends(start(4, "work", path)) == [(0, "")] * 4
    return torch.load(f"{path}.results")


@pytest.mark.parametrize("name", SAME)
def test_ranks_compute_what_one_process_does(name, expected, results):
    for world in WORLDS:
        ranks = results[f"{name} on {world}"]
        assert len(ranks) == world
        for got in ranks:
            torch.testing.assert_close(got["logits"], expected[name]["logits"], rtol=0, atol=1e-4)
            assert got["tokens"] == expected[name]["tokens"]


def test_all_ranks_have_the_same_logits(results):
    """To the bit, for each of them chooses tokens from its own."""
    every = [each for each in results.values() if isinstance(each[0], dict)]
    assert len(every) > 10
    for ranks in every:
        for each in ranks:
            assert_bitwise_equal(each["logits"], ranks[0]["logits"])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_quantized_activations_stay_close(name, expected, results):
    for world in WORLDS:
        got = results[f"{name} on {world}"][0]
        assert kl_divergence(expected[name]["logits"], got["logits"]).max() < 0.02


def test_one_process_reads_what_was_divided_for_one(checkpoints):
    divided, whole = (alone(checkpoints / name, HIGH) for name in ("v2 mp1", "v2"))
    assert_bitwise_equal(divided["logits"], whole["logits"])
    with pytest.raises(
        BlockscaleError, match=r"was converted for 2 ranks \(expected 1, the ranks of this run"
    ):
        rank_worker.load("cpu", checkpoints / "v2 mp2")


@pytest.mark.parametrize("name", REFUSED)
def test_a_disagreement_ends_all_ranks_with_one_line(name, checkpoints, results):
    world, _, line = REFUSED[name]
    assert results[name] == [line.format(root=checkpoints)] * world


@pytest.mark.parametrize("how", ["computing", "waiting"])
def test_a_rank_that_is_killed_ends_the_others(how):
    codes = ends(start(3, "die", how), keep_open=how == "waiting")
    line = "rank 1 is gone: its process ended, or its machine cannot be reached; see what it has said\n"
    assert codes == [(2, line), (-signal.SIGKILL, ""), (2, f"rank 2: {line}")]


def test_a_rank_that_fails_alone_ends_the_others():
    (code, line), (_, own) = ends(start(2, "fail", ""))
    assert (code, own) == (2, "is alone\n")
    assert line.startswith("rank 1 is gone")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "world", "block", "ends"),
    [
        (10944, 2, 128, [5504, 10944]),  # 86 blocks, the last one of 64
        (2816, 4, 128, [768, 1536, 2176, 2816]),
        (208, 4, 128, [64, 128, 192, 208]),  # two blocks, halved
        (2048, 32, 128, [64 * count for count in range(1, 33)]),
        (323, 4, 1, [81, 162, 243, 323]),
        (129280, 8, 1, [16160 * count for count in range(1, 9)]),
    ],
)
def test_shares_are_even_and_no_block_is_cut_through(size, world, block, ends):
    parts = [share(size, Ranks(rank, world), block) for rank in range(world)]
    assert [part.stop for part in parts] == ends
    assert [part.start for part in parts] == [0, *ends[:-1]]
    assert not parts[0].cuts_through(block)


def test_what_is_too_small_to_share_is_refused():
    with pytest.raises(
        BlockscaleError, match=r"too small for so many ranks \(expected at least 4 rows .*got 3"
    ):
        share(3, Ranks(0, 4), 128)


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
def test_under_torchrun_one_process_reads_and_writes(tmp_path, capsys):
    """The article's command on a checkpoint divided for two writes what one process does on the whole one."""
    from blockscale.cli.main import main

    shard_checkpoint(data.TINY_DEEPSEEK, tmp_path / "mp2", 2)
    (tmp_path / "prompts").write_text("Who are you?\nTell me of the sea.\n")
    rest = ("--input-file", str(tmp_path / "prompts"), "--max-new-tokens", "8", "--temperature", "0")
    with pytest.raises(SystemExit):
        main(["generate", "--ckpt-path", str(data.TINY_DEEPSEEK), *rest])
    expected = capsys.readouterr().out
    chat = ("--interactive", "--max-new-tokens", "8", "--temperature", "0")
    lines = "Who are you?\n/clear\nTell me of the sea.\n/exit\n"
    divided = torchrun("inference/generate.py", "--ckpt-path", tmp_path / "mp2", *chat, input=lines)
    assert divided.returncode == 0
    answers = re.findall(r"Completion: (.*)", expected)
    assert divided.stdout.splitlines() == answers
    assert divided.stderr.count("8 written") == 2


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
def test_two_gpus_write_what_one_does(tmp_path):
    """Under CUDA graphs, through NCCL: up to tokens that are about as likely, which rounding decides."""
    (tmp_path / "configs").write_text(json.dumps(test_gpu.CONFIGS))
    outputs = ends(start(2, "compare", tmp_path / "configs"), timeout=800)
    assert [code for code, _ in outputs] == [0, 0], outputs
    results = json.loads((tmp_path / "configs.results").read_text())
    assert len(results) == len(rank_worker.FORMATS) * len(test_gpu.CONFIGS)
    for name, each in results.items():
        print(f"{name}: {each}, of {3 * 24} tokens")
        assert each["same on both"], name
        assert each["divergence"] < test_gpu.CLOSE, name
        assert each["less likely by"] < 0.15, name
