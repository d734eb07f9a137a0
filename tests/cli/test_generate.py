"""`blockscale generate` on a trained model, as it is and quantized; what it refuses."""

import io
import re
import sys

import pytest

from tests import data
from tests.model import models

pytestmark = pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    from blockscale.checkpoint.convert import quantize_checkpoint

    folder = tmp_path_factory.mktemp("fp8") / "model"
    quantize_checkpoint(data.TINY_DEEPSEEK, folder)
    return folder


def test_every_line_of_a_file_is_answered(fp8, tmp_path, blockscale):
    (tmp_path / "prompts").write_text("Who are you?\n\nTell me of the sea.\n")
    options = ("--input-file", tmp_path / "prompts", "--max-new-tokens", 8, "--temperature", 0)
    for folder in (data.TINY_DEEPSEEK, fp8):
        code, out, err = blockscale("generate", "--ckpt-path", folder, *options)
        assert code == 0
        answers = out.split("\n\n")
        assert [each.splitlines()[0] for each in answers[:2]] == [
            "Prompt: Who are you?",
            "Prompt: Tell me of the sea.",
        ]
        assert all("\nCompletion: " in each for each in answers[:2])
        assert "16 written" in err


def test_four_bit_experts_are_multiplied_and_audited(tmp_path, blockscale):
    source = data.TINY_DEEPSEEK
    assert blockscale("quantize", source, tmp_path / "low", "--recipe", "w4a8")[0] == 0
    (tmp_path / "prompts").write_text("Who are you?\n")
    options = ("--input-file", tmp_path / "prompts", "--max-new-tokens", 3, "--temperature", 0)
    code, out, err = blockscale(
        "generate", "--ckpt-path", tmp_path / "low", *options, "--compute", "fp8", "--debug-gemm"
    )
    assert (code, "Completion: " in out, "3 written" in err) == (0, True, True)
    for layer in range(1, 6):
        for part in ("gate_up", "down"):
            assert f"layers.{layer}.mlp.{part} w4-masked" in re.sub(" +", " ", err)
    assert "layers.0.mlp.down dense" in re.sub(" +", " ", err)


def test_drafts_change_no_text_and_are_counted(tmp_path, blockscale):
    models.tiny_mtp(tmp_path / "model")
    (tmp_path / "prompts").write_text("Who are you?\nTell me of the sea.\n")
    options = ("--input-file", tmp_path / "prompts", "--max-new-tokens", 12, "--temperature", 0)
    _, plain, told = blockscale("generate", "--ckpt-path", tmp_path / "model", *options)
    code, out, err = blockscale("generate", "--ckpt-path", tmp_path / "model", *options, "--mtp")
    assert (code, out) == (0, plain)
    assert "drafts accepted" not in told
    assert re.search(r"24 written, [0-9.]+ tokens/s, \d+% of \d+ drafts accepted", err)


def test_the_cache_may_be_in_fp8(blockscale, monkeypatch, tmp_path):
    from blockscale.model.attention import KVCache

    made = []
    make = KVCache.__init__
    monkeypatch.setattr(
        KVCache, "__init__", lambda self, *args, fp8: (made.append(fp8), make(self, *args, fp8=fp8))[1]
    )
    (tmp_path / "prompts").write_text("Who are you?\n")
    options = ("--input-file", tmp_path / "prompts", "--max-new-tokens", 4, "--temperature", 0)
    for choice in ((), ("--kv-cache", "fp8")):
        code, _, err = blockscale("generate", "--ckpt-path", data.TINY_DEEPSEEK, *options, *choice)
        assert (code, "4 written" in err) == (0, True)
    assert made == [False, True]


def test_a_chat_goes_on_until_exit(blockscale, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n/clear\nWho are you?\n\n/exit\nnot read\n"))
    chat = ("--interactive", "--max-new-tokens", 6, "--temperature", 0)
    code, out, err = blockscale("generate", "--ckpt-path", data.TINY_DEEPSEEK, *chat)
    assert code == 0
    half = len(out) // 2
    assert out[:half] == out[half:], "nothing is left of what was cleared"
    assert err.count("6 written") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --interactive or --input-file, one of them"),
        (("--interactive", "--temperature", -1), "--temperature"),
        (("--interactive", "--top-p", 0), "bad top_p (expected above 0, up to 1, got 0.0)"),
        (
            ("--interactive", "--config", "inference/configs/config_v3.1.json"),
            "shape is not that of the config",
        ),
        (("--input-file", "no such file"), "no such file: cannot be read"),
        (
            ("--interactive", "--mtp"),
            "checkpoint has no multi-token prediction layer (expected model.layers.6.",
        ),
    ],
)
def test_what_is_refused(arguments, message, blockscale):
    code, out, err = blockscale("generate", "--ckpt-path", data.TINY_DEEPSEEK, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, blockscale):
    code, out, err = blockscale("generate", "--ckpt-path", tmp_path, "--interactive")
    assert (code, out) == (2, "")
    assert f"{tmp_path}: no tokenizer (expected tokenizer.json" in err
