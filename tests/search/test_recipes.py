"""Recipes say what was assigned, in few entries."""

import random

import pytest

from blockscale.checkpoint.precision import parse_precision
from blockscale.search.recipes import compact
from blockscale.search.units import find_units

DENSE = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FORMATS = ("bf16", "fp8", "fp8:64x64", "fp8:1x128")


def signatures(names, shape=(256, 256)):
    return dict.fromkeys(names, ("BF16", shape))


def llama(layers):
    for layer in range(layers):
        yield from (f"model.layers.{layer}.self_attn.{leaf}.weight" for leaf in DENSE)
        yield from (f"model.layers.{layer}.mlp.{leaf}.weight" for leaf in MLP)


def deepseek(layers, experts=3):
    for layer in range(layers):
        yield from (f"model.layers.{layer}.self_attn.{leaf}.weight" for leaf in LATENT)
        parents = (
            ["mlp"]
            if layer == 0
            else ["mlp.shared_experts", *(f"mlp.experts.{number}" for number in range(experts))]
        )
        for parent in parents:
            yield from (f"model.layers.{layer}.{parent}.{leaf}.weight" for leaf in MLP)


def units_of(names):
    tensors = signatures(names)
    return find_units(list(tensors), tensors)


def test_units_are_what_engines_fuse():
    assert [(unit.name, len(unit.tensors)) for unit in units_of(llama(1))] == [
        ("model.layers.0.self_attn.q_proj+k_proj+v_proj", 3),
        ("model.layers.0.self_attn.o_proj", 1),
        ("model.layers.0.mlp.gate_proj+up_proj", 2),
        ("model.layers.0.mlp.down_proj", 1),
    ]
    experts = [unit for unit in units_of(deepseek(2)) if unit.role == "experts"]
    assert [(unit.name, len(unit.tensors)) for unit in experts] == [("model.layers.1.mlp.experts", 9)]
    assert experts[0].source_bytes == 9 * 256 * 256 * 2


@pytest.mark.parametrize("names", [tuple(llama(6)), tuple(deepseek(6))], ids=["llama", "deepseek"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(10))
def test_the_precision_gives_every_tensor_its_format(names, share, seed):
    draw = random.Random(seed)
    units = units_of(names)
    usual = {role: draw.choice(FORMATS) for role in {unit.role for unit in units}}
    formats = [draw.choice(FORMATS) if draw.random() < share else usual[unit.role] for unit in units]
    precision = parse_precision(compact(units, formats))
    for unit, wanted in zip(units, formats, strict=True):
        assert {str(precision.format_of(name)) for name in unit.tensors} == {wanted}, unit.name
    assert str(precision.format_of("lm_head.weight")) in ("None", "bf16")


def test_what_is_alike_is_said_once():
    units = units_of(deepseek(6))
    assert compact(units, ["fp8"] * len(units)) == {"default": "fp8"}
    by_role = ["fp8" if unit.role == "experts" else "bf16" for unit in units]
    assert compact(units, by_role) == {"default": "bf16", "experts": "fp8"}


def test_exceptions_are_the_widest_pattern_that_is_true():
    units = units_of(llama(4))

    def said(bf16):
        return compact(units, ["bf16" if bf16(unit.name) else "fp8" for unit in units])

    assert said(lambda name: ".0." in name) == {"default": "fp8", "model.layers.0.*": "bf16"}
    assert said(lambda name: ".3.mlp" in name) == {"default": "fp8", "model.layers.3.mlp.*": "bf16"}
    assert said(lambda name: ".3." in name and "q_proj" in name) == {
        "default": "fp8",
        "model.layers.3.self_attn.[kqv]_proj": "bf16",
    }
    assert said(lambda name: "o_proj" in name and ".2." not in name) == {
        "default": "fp8",
        "model.layers.*.self_attn.o_proj": "bf16",
        "model.layers.2.*": "fp8",
    }


def test_a_layer_1_is_not_a_layer_11():
    units = units_of(llama(12))
    formats = ["bf16" if ".layers.1." in unit.name else "fp8" for unit in units]
    precision = compact(units, formats)
    assert precision == {"default": "fp8", "model.layers.1.*": "bf16"}
    assert str(parse_precision(precision).format_of("model.layers.11.mlp.up_proj.weight")) == "fp8"
