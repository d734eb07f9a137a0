"""The model on a GPU: kernels and graphs against the CPU and against each other, on random weights."""

import pytest
import torch

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.metrics import kl_divergence
from blockscale.model.attention import Batch
from blockscale.model.config import from_huggingface
from blockscale.model.decode import decode, decoder
from blockscale.model.generate import generate
from blockscale.model.load import load_model
from blockscale.model.prefill import prefill
from blockscale.model.speculative import Drafting
from blockscale.reference.attention import Spans
from blockscale.testing.random_model import random_model

pytestmark = pytest.mark.gpu

# Whole blocks, so that shared experts run with the others; groups, a bias, query latents, split blocks.
V2 = {
    "model_type": "deepseek_v2",
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 400,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 20,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "topk_method": "greedy",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
}
V3 = {
    **V2,
    "model_type": "deepseek_v3",
    "q_lora_rank": 192,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 192,
}
CONFIGS = {"v2": V2, "v3": V3}
# Options of random_model.
FORMATS = {
    "bf16": {},
    "fp8": {"fmt": BlockFP8()},
    "ue8m0": {"fmt": BlockFP8(scale_fmt="ue8m0")},
    "int4": {"fmt": BlockFP8(), "experts": GroupInt(4, 128)},
    "mxfp4": {"fmt": BlockFP8(), "experts": MXFP4()},
}
# Nats between the same model with sums in another order, on average: quantized activations jump where sums
# differ by an ulp, and a token near a tie of experts goes another way.
CLOSE = 0.03


@pytest.fixture(scope="module", params=[(c, f) for c in CONFIGS for f in FORMATS], ids="-".join)
def model(request):
    family, name = request.param
    return random_model(from_huggingface(CONFIGS[family]), torch.device("cuda"), **FORMATS[name])


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1000, (length,), generator=generator).tolist() for length in lengths]


def test_it_computes_what_the_cpu_computes(request, model):
    family, name = request.node.callspec.params["model"]
    there = random_model(from_huggingface(CONFIGS[family]), torch.device("cpu"), **FORMATS[name])
    # Generators differ between devices: take the GPU's weights along.
    _copy(model, there)
    some = prompts(200, 3, 70)
    here = prefill(model, model.cache(3, 256), some).cpu()
    assert kl_divergence(prefill(there, there.cache(3, 256), some), here).mean() < CLOSE


def test_decoding_continues_what_prefill_read(model):
    """Masked experts and absorbed attention against contiguous experts and naive attention."""
    (prompt,) = prompts(150)
    cache = model.cache(1, 256)
    prefill(model, cache, [prompt[:140]])
    for length in range(141, 151):
        logits = decode(model, cache, [0], torch.tensor([prompt[length - 1]], device="cuda"), [length])
    whole = prefill(model, model.cache(1, 256), [prompt])
    assert kl_divergence(whole, logits).mean() < CLOSE


@pytest.mark.parametrize("count", [1, 3, 9])
def test_graphs_do_what_eager_calls_do(model, count):
    lengths = [600 - 37 * row for row in range(count)]
    some = prompts(*lengths)
    eager, captured = model.cache(count, 1024), model.cache(count, 1024)
    for cache in (eager, captured):
        prefill(model, cache, some)
    graphs = decoder(model, captured)
    tokens = torch.arange(count, device="cuda")
    for step in range(1, 4):
        now = [length + step for length in lengths]
        expected = decode(model, eager, range(count), tokens, now)
        got = graphs(range(count), tokens, now)
        assert kl_divergence(expected, got).mean() < CLOSE
        tokens = expected.argmax(-1)
    torch.testing.assert_close(captured.latents.float(), eager.latents.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_drafting_in_graphs_is_drafting_without(formats, count):
    config = from_huggingface({**V3, "num_nextn_predict_layers": 1})
    model = random_model(config, torch.device("cuda"), **formats, mtp=True)
    lengths = [300 + 41 * row for row in range(count)]
    seen = {}
    for draws in (False, True):  # what draws takes no graphs
        drafting = Drafting(model, model.mtp, model.cache(count, 512), lambda x: x.argmax(-1), draws)
        states = [drafting.start(prompts(*lengths)).clone()]
        for step in range(4):
            now = [length + 2 * step for length in lengths]
            states.append(drafting.advance(range(count), states[-1], now).clone())
        seen[draws] = torch.stack(states)
    assert torch.equal(seen[False], seen[True])


def test_sequences_of_a_batch_do_not_see_each_other(model):
    """A step of a sequence alone and among others, after prompts that were read together."""
    some, tokens = prompts(40, 300, 5), torch.tensor([1, 2, 3], device="cuda")
    together = model.cache(3, 512)
    prefill(model, together, some)
    steps = decode(model, together, range(3), tokens, [41, 301, 6])
    for row, prompt in enumerate(some):
        cache = model.cache(1, 512)
        prefill(model, cache, [prompt])
        alone = decode(model, cache, [0], tokens[row : row + 1], [len(prompt) + 1])
        assert kl_divergence(alone, steps[row : row + 1]).mean() < CLOSE


def test_a_sequence_may_end_before_the_others(model):
    """There is a graph for each number of sequences that is left."""
    seen = []

    def listen(number, token):
        seen.append(number)
        return number == 1 and seen.count(1) == 2

    written = generate(model, prompts(40, 300, 5), max_new_tokens=6, stop=(), on_token=listen)
    assert [len(each) for each in written] == [6, 2, 6]


def test_a_cache_in_fp8_changes_little(model):
    (prompt,) = prompts(600)
    logits = []
    for fp8 in (False, True):
        cache = model.cache(1, 1024, fp8=fp8)
        prefill(model, cache, [prompt[:-1]])
        token = torch.tensor(prompt[-1:], device="cuda")
        logits.append(decode(model, cache, [0], token, [600]))
    assert 0 < kl_divergence(*logits).mean() < 0.1


def test_naive_and_absorbed_attention_of_a_call_agree(model):
    (prompt,) = prompts(64)
    ids = torch.tensor(prompt, device="cuda")
    positions, rows = torch.arange(64, device="cuda"), torch.zeros(64, dtype=torch.int64, device="cuda")
    logits = [
        model.logits(model(Batch(ids, positions, rows, spans, 64), model.cache(1, 64)))
        for spans in (Spans(((0, 0, 64),), ids.device), None)
    ]
    assert kl_divergence(*logits).mean() < CLOSE


OURS = ("blockscale.model", "blockscale.reference.w4")


def _copy(source, target):
    """Weights of one model into another of the same layers, wherever they are."""
    for name, theirs in vars(source).items():
        ours = vars(target)[name]
        _copy_part(theirs, ours)


def _copy_part(theirs, ours):
    if isinstance(theirs, torch.Tensor):
        ours.copy_(theirs.cpu())
    elif isinstance(theirs, (list, tuple)):
        for one, other in zip(theirs, ours, strict=True):
            _copy_part(one, other)
    elif hasattr(theirs, "__dict__") and type(theirs).__module__.startswith(OURS):
        for name, each in vars(theirs).items():
            _copy_part(each, vars(ours)[name])


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_float32_logits_are_those_of_transformers(tmp_path, family):
    """Kernels, graphs and experts one by one, where nothing is rounded to 16 bits."""
    from tests.model import models

    theirs = models.make(tmp_path, family)
    ours = load_model(tmp_path, device="cuda", dtype=torch.float32)
    (prompt,) = prompts(60)
    prompt = [token % 320 for token in prompt]
    expected = models.logits(theirs, prompt)[-1]
    cache = ours.cache(1, 64)
    prefill(ours, cache, [prompt[:-1]])
    token = torch.tensor(prompt[-1:], device="cuda")
    (step,) = decoder(ours, cache)([0], token, [60])
    torch.testing.assert_close(step.cpu(), expected, rtol=0, atol=1e-4)
