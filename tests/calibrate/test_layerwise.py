import pytest
import torch

from blockscale import reference
from blockscale.calibrate.activations import quantized_inputs
from blockscale.calibrate.layerwise import round_layer
from blockscale.calibrate.rounding import Search
from blockscale.calibrate.stations import Wanted, decoder_layers, first_chunks
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8, ScaleFmt

transformers = pytest.importorskip("transformers")
FMT = BlockFP8((128, 128))


def tiny_llama(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).float().eval()


def tokens(rows: int = 8, length: int = 48) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@torch.no_grad()
def round_decoder(model, ids, fmt, choose=lambda name: True, search=None):
    """Round all linear layers of a decoder in place, in chunks of three sequences."""
    layers, prefix = decoder_layers(model)
    chunks, found = first_chunks(model, layers, ids, 3), {}
    for number, layer in enumerate(layers):
        start = f"{prefix}.{number}."
        names = [name.removeprefix(start) for name in linears(model) if name.startswith(start)]
        wanted = {name: Wanted(fmt, fmt) for name in names if choose(name)}
        for place, rounding in round_layer(layer, chunks, wanted, search).roundings.items():
            found[start + place.parameter] = rounding
    return found


@torch.no_grad()
def quantized_logits(model: torch.nn.Module, ids: torch.Tensor, scale_fmt: ScaleFmt) -> torch.Tensor:
    for module in linears(model).values():
        module.register_forward_pre_hook(
            lambda _, x: (quantized_inputs(x[0], BlockFP8((128, 128), scale_fmt)),)
        )
    return model(input_ids=ids).logits


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_every_linear_layer_is_rounded_and_the_logits_are_closer_than_with_plain_rounding(
    scale_fmt: ScaleFmt,
):
    fmt, ids = BlockFP8((128, 128), scale_fmt), tokens()
    with torch.no_grad():
        wanted = tiny_llama()(input_ids=ids).logits
    model, plain = tiny_llama(), tiny_llama()
    found = round_decoder(model, ids, fmt)
    assert set(found) == set(linears(model))
    for name, module in linears(model).items():
        codes, scale = found[name]
        values = reference.dequantize_weight(codes, scale, fmt.block_size, torch.float32)
        assert torch.equal(module.weight, values)
        other = linears(plain)[name]
        rounded = reference.quantize_weight(other.weight, fmt.block_size, scale_fmt)
        other.weight.data = reference.dequantize_weight(*rounded, fmt.block_size, torch.float32)
    ours, theirs = (
        (quantized_logits(each, ids, scale_fmt) - wanted).square().sum() for each in (model, plain)
    )
    assert ours < 0.8 * theirs


def test_only_chosen_layers_change_and_no_hook_is_left():
    model, before = tiny_llama(), tiny_llama()
    found = round_decoder(model, tokens(), FMT, lambda name: "mlp" in name)
    assert len(found) == 6
    assert not any(module._forward_pre_hooks for module in model.modules())
    for (name, new), old in zip(linears(model).items(), linears(before).values(), strict=True):
        assert torch.equal(new.weight, old.weight) == ("mlp" not in name)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_layers_that_share_inputs_share_moments(monkeypatch: pytest.MonkeyPatch):
    from blockscale.calibrate import layerwise

    calls = []
    monkeypatch.setattr(
        layerwise, "no_moments", lambda *a, make=layerwise.no_moments: calls.append(a[0]) or make(*a)
    )
    round_decoder(tiny_llama(), tokens(), FMT, search=Search(sweeps=0))
    assert calls == [96, 96, 96, 160] * 2


def test_too_few_tokens_are_refused():
    with pytest.raises(BlockscaleError, match="too few calibration tokens"):
        round_decoder(tiny_llama(), tokens(1, 48), FMT)


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(BlockscaleError, match="no decoder layers"):
        round_decoder(torch.nn.Linear(4, 4), tokens(), FMT)


def test_quantized_inputs_are_those_of_the_reference():
    x = torch.randn(3, 5, 200)
    scaled = reference.quantize_activation(x, 128, "ue8m0")
    expected = reference.dequantize_activation(*scaled, dtype=torch.float32)
    assert torch.equal(quantized_inputs(x, BlockFP8((128, 128), "ue8m0")), expected)


def test_targets_see_the_inputs_of_the_original_model(monkeypatch: pytest.MonkeyPatch):
    from blockscale.calibrate import layerwise

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    add = layerwise.add_tokens
    monkeypatch.setattr(
        layerwise, "add_tokens", lambda moments, x, xq: seen.append((x.clone(), xq)) or add(moments, x, xq)
    )
    original, inputs = tiny_llama(), []
    original.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        original(input_ids=tokens())
    round_decoder(tiny_llama(), tokens(), FMT)
    x, xq = (torch.cat(parts) for parts in zip(*seen[-3:], strict=True))  # the last linear layer, in chunks
    torch.testing.assert_close(x, inputs[0])
    # By then the quantized model is somewhere else, by more than quantizing these activations would do.
    moved = (xq - x).norm()
    assert moved > 1.2 * (quantized_inputs(x, FMT) - x).norm()
