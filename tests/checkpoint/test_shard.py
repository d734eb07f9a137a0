"""Shards for ranks: put together again they are the checkpoint, bit for bit, and the names are DeepSeek's."""

import json

import pytest
import torch
from safetensors.torch import load_file

from blockscale import reference
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

FP8 = torch.float8_e4m3fn
# Written by hand from DeepSeek's model.py, on purpose not from the code under test.
RENAMED = {
    "embed_tokens": "embed", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo",
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "lm_head": "head",
    "self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias",
}  # fmt: skip
SPLIT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1}


def renamed(name):
    return ".".join(RENAMED.get(part, part) for part in name.removeprefix("model.").split("."))


def split_dim(name):
    return None if ".experts." in name else SPLIT.get(name.split(".")[-2])


def shards(folder, world):
    return [load_file(folder / f"model{rank}-mp{world}.safetensors") for rank in range(world)]


def together(parts, name):
    """A tensor of all ranks by DeepSeek's name: its parts side by side, or what all that have it have."""
    held = [part[name] for part in parts if name in part]
    if ".experts." in name:
        assert len(held) == 1, f"{name} is on {len(held)} ranks"
    elif len(held) != len(parts):
        raise AssertionError(f"{name} is missing on a rank")
    dim = split_dim(name)
    if dim is not None:
        return torch.cat([tensor.view(torch.uint8) for tensor in held], dim).view(held[0].dtype)
    for tensor in held:
        assert_bitwise_equal(tensor, held[0], name)
    return held[0]


def convert_to(tmp_path, model, world, name="out", **options):
    source = data.write(tmp_path / f"source of {name}", model, shards=3)
    return shard_checkpoint(source, tmp_path / name, world, **options)


def reference_shapes(config, rank, world, fp8_block=None):
    """Name -> shape of every parameter that DeepSeek's Transformer has on a rank; no head in FP8."""
    shapes = {}

    def linear(name, rows, columns, quantized=True):
        shapes[f"{name}.weight"] = (rows, columns)
        if fp8_block is not None and quantized:
            shapes[f"{name}.scale"] = (-(-rows // fp8_block[0]), -(-columns // fp8_block[1]))

    def mlp(name, width):
        linear(f"{name}.w1", width, hidden)
        linear(f"{name}.w2", hidden, width)
        linear(f"{name}.w3", width, hidden)

    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes["embed.weight"] = (config["vocab_size"] // world, hidden)
    for layer in range(config["num_hidden_layers"]):
        attention, ffn = f"layers.{layer}.attn", f"layers.{layer}.ffn"
        rank_of_q = config.get("q_lora_rank")
        if rank_of_q:
            linear(f"{attention}.wq_a", rank_of_q, hidden)
            shapes[f"{attention}.q_norm.weight"] = (rank_of_q,)
        linear(
            f"{attention}.wq_b" if rank_of_q else f"{attention}.wq",
            heads * (nope + rope) // world,
            rank_of_q or hidden,
        )
        linear(f"{attention}.wkv_a", latent + rope, hidden)
        shapes[f"{attention}.kv_norm.weight"] = (latent,)
        linear(f"{attention}.wkv_b", heads * (nope + value) // world, latent)
        linear(f"{attention}.wo", hidden, heads * value // world)
        if layer < config["first_k_dense_replace"]:
            mlp(ffn, config["intermediate_size"] // world)
        else:
            shapes[f"{ffn}.gate.weight"] = (experts, hidden)
            if config["model_type"] == "deepseek_v3":
                shapes[f"{ffn}.gate.bias"] = (experts,)
            for expert in range(rank * experts // world, (rank + 1) * experts // world):
                mlp(f"{ffn}.experts.{expert}", width)
            mlp(f"{ffn}.shared_experts", config["n_shared_experts"] * width // world)
        shapes |= {f"layers.{layer}.{norm}.weight": (hidden,) for norm in ("attn_norm", "ffn_norm")}
    linear("head", config["vocab_size"] // world, hidden, quantized=False)
    shapes["norm.weight"] = (hidden,)
    return shapes


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("make", [data.deepseek_v3, data.deepseek_v2])
@pytest.mark.parametrize("scale_fmt", [None, "float32", "ue8m0"])
def test_the_shards_are_the_checkpoint(tmp_path, make, world, scale_fmt):
    model = make(heads=4)
    if scale_fmt is not None:
        model = data.in_fp8(model, block_size=(2, 2), scale_fmt=scale_fmt)  # 18 and 50 rows divide by 2
    report = convert_to(tmp_path, model, world)
    assert report.tensors == {"copy": len(model.tensors)}
    parts = shards(tmp_path / "out", world)
    assert {name for part in parts for name in part} == {renamed(name) for name in model.tensors}
    for name, tensor in model.tensors.items():
        assert_bitwise_equal(together(parts, renamed(name)), tensor, name)
    for rank, part in enumerate(parts):
        shapes = reference_shapes(model.config, rank, world, (2, 2) if scale_fmt else None)
        own = {name: tuple(tensor.shape) for name, tensor in part.items() if ".2." not in name[:9]}
        assert own == shapes


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    model = data.in_fp8(data.deepseek_v3(), block_size=(4, 4), scale_fmt="ue8m0")
    convert_to(tmp_path, model, 2)
    out = data.contents(tmp_path / "out")
    assert data.CARRIED.items() <= out.items()
    assert data.read_config(tmp_path / "out") == model.config
    files = {"model0-mp2.safetensors", "model1-mp2.safetensors"}
    assert out.keys() == files | data.CARRIED.keys() | {"config.json", "blockscale.json"}
    manifest = json.loads(out["blockscale.json"])
    assert manifest["options"] == {"mp": 2, "mtp": True, "on_ragged_split": "refuse"}
    assert "model1-mp2.safetensors:layers.0.ffn.w1.weight" in manifest["tensors"]


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_trained_model(tmp_path, world):
    shard_checkpoint(data.TINY_DEEPSEEK, tmp_path / "out", world)
    original, parts = data.read(data.TINY_DEEPSEEK), shards(tmp_path / "out", world)
    assert {name for part in parts for name in part} == {renamed(name) for name in original}
    for name, tensor in original.items():
        assert_bitwise_equal(together(parts, renamed(name)), tensor, name)


def test_multi_token_prediction_is_kept_under_the_names_of_a_layer_and_said(tmp_path):
    report = convert_to(tmp_path, data.deepseek_v3(), 2)
    assert report.warnings == (
        "multi-token prediction is kept as layers.2.*, which DeepSeek's own load_model refuses: "
        "for that, leave it out with --no-mtp",
    )
    part = shards(tmp_path / "out", 2)[1]
    own = {name: tuple(tensor.shape) for name, tensor in part.items() if name.startswith("layers.2.")}
    extras = {
        "layers.2.embed.weight": (24, 160), "layers.2.enorm.weight": (160,),
        "layers.2.hnorm.weight": (160,), "layers.2.eh_proj.weight": (160, 320),
        "layers.2.shared_head.norm.weight": (160,), "layers.2.shared_head.head.weight": (24, 160),
    }  # fmt: skip
    sparse = {name: tuple(t.shape) for name, t in part.items() if name.startswith("layers.1.")}
    assert own == extras | {name.replace("layers.1.", "layers.2."): sparse[name] for name in sparse}


def test_without_multi_token_prediction_the_config_does_not_promise_it(tmp_path):
    model = data.deepseek_v3()
    report = convert_to(tmp_path, model, 2, mtp=False)
    assert report.warnings == ("multi-token prediction (layer 2) is left out",)
    assert report.tensors == {"copy": 41, "drop": 32}
    for rank, part in enumerate(shards(tmp_path / "out", 2)):
        own = {name: tuple(tensor.shape) for name, tensor in part.items()}
        assert own == reference_shapes(model.config, rank, 2)
    assert data.read_config(tmp_path / "out") == {**model.config, "num_nextn_predict_layers": 0}


def test_a_model_without_multi_token_prediction_says_nothing(tmp_path):
    assert convert_to(tmp_path, data.deepseek_v2(), 2).warnings == ()
    assert convert_to(tmp_path, data.deepseek_v2(), 2, "again", mtp=False).warnings == ()


@pytest.fixture(params=["float32", "ue8m0"])
def cut_through(request):
    """Blocks of 16 over 2 ranks: 36 rows of a shared expert, 100 of the dense layer; the rest divides."""
    return data.in_fp8(data.deepseek_v3(), block_size=(16, 16), scale_fmt=request.param)


def test_a_division_that_cuts_through_blocks_is_refused(tmp_path, cut_through):
    source = data.write(tmp_path / "source", cut_through)
    line = data.refusal(lambda: shard_checkpoint(source, tmp_path / "out", 2), source, tmp_path / "out")
    assert line == (
        "model.layers.0.mlp.down_proj.weight: division over 2 ranks cuts through its FP8 blocks; 8 more "
        "like it (expected a multiple of 16 columns for each rank, got 200 / 2 = 100); use "
        "--on-ragged-split requantize, another number of ranks, or the BF16 checkpoint"
    )


def test_on_request_every_part_gets_a_grid_of_its_own(tmp_path, cut_through):
    model = cut_through
    fmt = model.config["quantization_config"].get("scale_fmt", "float32")
    report = convert_to(tmp_path, model, 2, on_ragged_split="requantize")
    ragged = [
        n for n in model.tensors if n.endswith("_proj.weight") and ("mlp.shared" in n or ".0.mlp." in n)
    ]
    assert report.tensors["requantize"] == len(ragged) == 9
    assert report.warnings[0] == (
        "9 FP8 weights are requantized, for a division over 2 ranks cuts through their blocks: "
        "model.layers.0.mlp.down_proj.weight and 8 more"
    )
    parts = shards(tmp_path / "out", 2)
    for name, tensor in model.tensors.items():
        if name not in ragged and name.removesuffix("_scale_inv") not in ragged:
            assert_bitwise_equal(together(parts, renamed(name)), tensor, name)
    for name in ragged:
        scale = model.tensors[f"{name}_scale_inv"]
        whole = reference.dequantize_weight(model.tensors[name], scale, (16, 16), torch.float32)
        there = renamed(name)
        for part, piece in zip(parts, whole.chunk(2, split_dim(there)), strict=True):
            codes, scale = reference.quantize_weight(piece.contiguous(), (16, 16), fmt)
            assert_bitwise_equal(part[there], codes, name)
            assert_bitwise_equal(part[there.replace(".weight", ".scale")], scale, name)
    assert (
        reference_shapes(model.config, 1, 2, (16, 16)).items()
        <= {name: tuple(tensor.shape) for name, tensor in parts[1].items()}.items()
    )


def test_requantized_in_strips_of_any_height(tmp_path, cut_through, monkeypatch):
    model = cut_through
    convert_to(tmp_path, model, 2, on_ragged_split="requantize")
    monkeypatch.setattr("blockscale.checkpoint.tasks.CHUNK_BYTES", 4 * 160 * 32)  # rows of 160: 2 blocks
    monkeypatch.setattr("blockscale.checkpoint.strips.CHUNK_BYTES", 1000)
    convert_to(tmp_path, model, 2, "strips", on_ragged_split="requantize")
    one, other = shards(tmp_path / "out", 2), shards(tmp_path / "strips", 2)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_bitwise_equal(a[name], b[name], name)


@pytest.mark.parametrize("side", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("width", [24, 40, 48])
@pytest.mark.parametrize("world", [2, 4])
def test_only_cuts_that_keep_every_value_are_made(tmp_path, width, world, side):
    """A rank's block that has values of two blocks would have to have two scales; a part of one takes its."""
    shapes = {"gate_proj": (width, 20), "up_proj": (width, 20), "down_proj": (20, width)}
    names = {f"model.layers.0.mlp.{leaf}.weight": shape for leaf, shape in shapes.items()}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1}
    model = data.Model({name: data.weight(name, *shape) for name, shape in names.items()}, config)
    model = data.in_fp8(model, block_size=(side, side))
    part = width // world
    own = {(place // part, place % part // side) for place in range(width)}
    both = {(place // part, place % part // side, place // side) for place in range(width)}
    source = data.write(tmp_path / "source", model)
    line = data.told(shard_checkpoint, source, tmp_path / "out", world)
    if len(both) > len(own):
        assert line is not None
        assert "cuts through its FP8 blocks" in line
        return
    assert line is None
    parts = shards(tmp_path / "out", world)
    for name in names:
        there, scale = renamed(name), model.tensors[f"{name}_scale_inv"]
        whole = reference.dequantize_weight(model.tensors[name], scale, (side, side), torch.float32)
        scales = [held[there.replace(".weight", ".scale")] for held in parts]
        pieces = [
            reference.dequantize_weight(held[there], scale, (side, side), torch.float32)
            for held, scale in zip(parts, scales, strict=True)
        ]
        assert_bitwise_equal(torch.cat(pieces, split_dim(there)), whole, name)


def test_scales_of_one_byte(tmp_path):
    model = data.in_fp8(data.deepseek_v3(), block_size=(2, 4), scale_fmt="ue8m0")
    scales = {n: t.to(torch.float8_e8m0fnu) for n, t in model.tensors.items() if n.endswith("_scale_inv")}
    convert_to(tmp_path, model.changed(scales), 2)
    parts = shards(tmp_path / "out", 2)
    for name, tensor in scales.items():
        assert_bitwise_equal(together(parts, renamed(name)), tensor, name)


def test_a_nan_in_a_weight_to_be_requantized(tmp_path, cut_through):
    model = cut_through
    name = "model.layers.0.mlp.up_proj.weight"
    model.tensors[name].view(torch.uint8)[7, 3] = 0x7F
    source, out = data.write(tmp_path / "source", model), tmp_path / "out"
    line = data.refusal(lambda: shard_checkpoint(source, out, 2, on_ragged_split="requantize"), source, out)
    place = "in model.safetensors: 1 NaN or Inf, the first at [7, 3]: cannot be requantized"
    assert line == f"{name} {place}"
