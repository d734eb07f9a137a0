"""Every defect planted in an FP8 checkpoint is found, and nothing else."""

import json

import pytest
import torch

from blockscale.checkpoint.lint.run import lint_checkpoint
from tests.checkpoint.lint.checkpoints import ENGINES, GATE, OUT, SERVERS, UP, S, W, write


def _drop(*names):
    return lambda tensors, entry: [tensors.pop(name) for name in names]


def _entry(**fields):
    return lambda tensors, entry: entry.update(fields)


def _high(name):
    """A weight back in BF16, without its scale, and not on the skip list."""

    def change(tensors, entry):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
        del tensors[f"{name}.weight_scale_inv"]

    return change


def _skip(*entries):
    return lambda tensors, entry: entry["modules_to_not_convert"].extend(entries)


def _cast(name, dtype):
    return lambda tensors, entry: tensors.update({name: tensors[name].to(dtype)})


def _both(*changes):
    return lambda tensors, entry: [change(tensors, entry) for change in changes]


DEFECTS = {
    "no activation_scheme": (
        lambda tensors, entry: entry.pop("activation_scheme"),
        SERVERS,
        {("error", "activation-scheme", "config.json activation_scheme")},
    ),
    "static activations": (
        _entry(activation_scheme="static"),
        ENGINES,
        {("error", "activation-scheme", "config.json activation_scheme")},
    ),
    "scale_fmt null": (
        _entry(scale_fmt=None),
        ["transformers"],
        {("error", "scale-fmt", "config.json scale_fmt")},
    ),
    "scale_fmt misspelled": (
        _entry(scale_fmt="uf8m0"),
        SERVERS,
        {("warning", "scale-fmt", "config.json scale_fmt")},
    ),
    "no block size": (
        lambda tensors, entry: entry.pop("weight_block_size"),
        ENGINES,
        {("error", "config", "config.json")},
    ),
    "an unknown method": (_entry(quant_method="awq"), ENGINES, {("warning", "method", "config.json")}),
    "a scale is missing": (_drop(OUT + S), ENGINES, {("silent", "missing-scale", OUT + W)}),
    "a scale of another name": (
        lambda tensors, entry: tensors.update({f"{OUT}.weight_scale": tensors.pop(OUT + S)}),
        ENGINES,
        {("silent", "missing-scale", OUT + W)},
    ),
    "a weight is missing": (_drop(OUT + W), ENGINES, {("error", "stray-scale", OUT + S)}),
    "another grid": (
        lambda tensors, entry: tensors.update({OUT + S: torch.ones(1, 1)}),
        ENGINES,
        {("error", "scale-shape", OUT + S)},
    ),
    "scales in BF16": (_cast(OUT + S, torch.bfloat16), ENGINES, {("warning", "scale-dtype", OUT + S)}),
    "scales in bytes": (_cast(OUT + S, torch.uint8), ENGINES, {("silent", "scale-dtype", OUT + S)}),
    "scales in E8M0": (_cast(OUT + S, torch.float8_e8m0fnu), ENGINES, {("warning", "scale-dtype", OUT + S)}),
    "a BF16 weight that is not listed": (_high(OUT), ENGINES, {("silent", "unlisted", OUT + W)}),
    "a BF16 weight with a scale": (
        _both(_cast(OUT + W, torch.bfloat16), _skip(OUT)),
        ENGINES,
        {("silent", "stray-scale", OUT + S)},
    ),
    "an FP8 weight that is listed": (_skip(OUT), SERVERS, {("error", "skipped", OUT + W)}),
    "half of a merged layer is FP8": (
        _both(_high(GATE), _skip(GATE)),
        SERVERS,
        {("error", "merged-skip", GATE + W), ("error", "merged-precision", UP + W)},
    ),
    "an FP8 embedding": (
        _cast("model.embed_tokens.weight", torch.float8_e4m3fn),
        ENGINES,
        {
            ("error", "role", "model.embed_tokens.weight"),
            ("silent", "missing-scale", "model.embed_tokens.weight"),
        },
    ),
    "an entry of a part of a path": (_skip("layers.7"), ["vllm"], {("warning", "entry", "config.json")}),
    "no skip list": (
        lambda tensors, entry: entry.pop("modules_to_not_convert"),
        ENGINES,
        set(),  # transformers leaves the head alone by itself, the others always do
    ),
    "the head is not listed": (
        _entry(modules_to_not_convert=[]),
        ["transformers"],
        {("silent", "head", "lm_head")},
    ),
}  # fmt: skip
CASES = [(name, engine) for name, (_, engines, _) in DEFECTS.items() for engine in engines]


@pytest.mark.parametrize(("defect", "engine"), CASES)
def test_a_planted_defect_is_found_and_nothing_else(tmp_path, made, defect, engine):
    change, _, expected = DEFECTS[defect]
    tensors, config = dict(made[0]), json.loads(json.dumps(made[1]))
    change(tensors, config["quantization_config"])
    found = lint_checkpoint(write(tmp_path / "bad", tensors, config), engine)
    assert {(each.severity, each.rule, each.where) for each in found.findings} == expected
    assert found.ok == all(severity == "warning" for severity, _, _ in expected)
