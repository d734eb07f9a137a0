"""The multi-token prediction layer: its drafts against plain PyTorch, and what it is read from."""

import logging

import pytest
import torch
import torch.nn.functional as F

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.errors import BlockscaleError
from blockscale.model.attention import Batch
from blockscale.model.load import load_model
from blockscale.model.speculative import Drafting
from blockscale.reference.attention import Spans
from tests import data
from tests.model import models

BRANCHES = {
    "v3": ("v3", {}),
    "v3 yarn, no query latent": ("v3", {"rope_parameters": models.YARN, "q_lora_rank": None}),
    "v3 dense": ("v3", {"first_k_dense_replace": 4}),
    "v2": ("v2", {}),
}


def load(folder, **options):
    return load_model(folder, device="cpu", dtype=torch.float32, **options)


def tokens(count, seed=0):
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_drafts(theirs, alone, extras, sequence):
    """Logits of the tokens from the third on, by transformers' decoder layer and the equations alone."""

    def normed(x, name):
        return F.rms_norm(x, x.shape[-1:], extras[f"{name}.weight"], theirs.config.rms_norm_eps)

    hidden = theirs.model(sequence[None, :-1]).last_hidden_state
    embedded = theirs.model.embed_tokens(sequence[None, 1:])
    both = torch.cat([normed(embedded, "enorm"), normed(hidden, "hnorm")], -1)
    x = both @ extras["eh_proj.weight"].T
    return theirs.lm_head(alone(inputs_embeds=x, use_cache=False).last_hidden_state)[0]


def drafts(model, sequence, absorbed):
    """The same by the runtime, read at once."""
    count = len(sequence) - 1
    cache = model.cache(1, count)
    spans = None if absorbed else Spans(((0, 0, count),), sequence.device)
    batch = Batch(sequence[:-1], torch.arange(count), torch.zeros(count, dtype=torch.int64), spans, count)
    hidden = model.normed(model(batch, cache))
    return model.head(model.mtp(model.embed(sequence[1:]), hidden, batch, cache))


@pytest.mark.parametrize("branch", BRANCHES)
def test_drafts_are_those_of_plain_torch(tmp_path, branch):
    family, changes = BRANCHES[branch]
    theirs, alone, extras = models.make_mtp(tmp_path, family, **changes)
    sequence = tokens(60)
    expected = expected_drafts(theirs, alone, extras, sequence)
    assert expected.abs().max() > 0.5, "nothing to compare"
    model = load(tmp_path, mtp=True)
    for absorbed in (False, True):
        torch.testing.assert_close(drafts(model, sequence, absorbed), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("likely", [False, True])
def test_every_draft_is_made_of_the_whole_sequence(tmp_path, likely, monkeypatch):
    """Prompts read in pieces, then steps whose drafts are right and wrong, against plain PyTorch."""
    reference = models.make_mtp(tmp_path, likely=likely)
    model = load(tmp_path, mtp=True)
    monkeypatch.setattr("blockscale.model.prefill._PREFILL_TOKENS", 16)
    sequences = [tokens(count, count).tolist() for count in (20, 1, 17, 5)]
    drafting = Drafting(model, model.mtp, model.cache(4, 60), lambda logits: logits.argmax(-1), draws=False)
    state, rights = drafting.start(sequences), []
    for _ in range(12):
        lengths = [len(each) for each in sequences]
        for sequence, line in zip(sequences, state.tolist(), strict=True):
            new, right = drafting.read(line)
            sequence += new
            rights.append(right)
            assert line[:2] == [len(sequence) - 1, sequence[-1]]
            expected = expected_drafts(*reference, torch.tensor(sequence))[-1]
            assert expected[line[2]] >= expected.max() - 1e-4
        state = drafting.advance(range(4), state, lengths)
    assert rights[:4] == [None] * 4
    assert set(rights[4:]) == ({True, False} if likely else {False})


def test_copies_of_embedding_and_head_are_not_needed(tmp_path):
    models.make_mtp(tmp_path)
    whole, sequence = drafts(load(tmp_path, mtp=True), tokens(20), False), tokens(20)
    data.rewrite(tmp_path, lambda found: [found.pop(name) for name in [*found] if _is_copy(name)])
    assert torch.equal(drafts(load(tmp_path, mtp=True), sequence, False), whole)


def _is_copy(name):
    return name.endswith((".3.embed_tokens.weight", "shared_head.head.weight"))


def test_an_fp8_layer_drafts_nearly_the_same(tmp_path):
    models.make_mtp(tmp_path / "wide", initializer_range=0.05)
    quantize_checkpoint(tmp_path / "wide", tmp_path / "fp8")
    exact = drafts(load(tmp_path / "wide", mtp=True), tokens(30), False).log_softmax(-1)
    for compute in ("fp8", "high"):
        got = drafts(load(tmp_path / "fp8", mtp=True, compute=compute), tokens(30), False).log_softmax(-1)
        assert 0 < (exact.exp() * (exact - got)).sum(-1).mean() < 0.1


def test_a_layer_that_is_not_asked_for_is_neither_read_nor_told_of(tmp_path, caplog):
    models.make_mtp(tmp_path)
    lines = {}
    for mtp in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = load(tmp_path, mtp=mtp)
        assert (model.mtp is not None) == mtp
        lines[mtp] = caplog.records[-1].message
        assert "not used" not in lines[mtp]
    count = {mtp: int(line.split()[2]) for mtp, line in lines.items()}
    # Of the layer: 1 projection, 5 of attention, 16 experts and a shared one with 3 each.
    assert count[True] - count[False] == 1 + 5 + 17 * 3


def test_a_checkpoint_without_the_layer_is_refused(tmp_path):
    models.make(tmp_path)
    line = (
        "checkpoint has no multi-token prediction layer "
        r"\(expected model.layers.3.eh_proj.weight\); leave out --mtp"
    )
    with pytest.raises(BlockscaleError, match=line):
        load(tmp_path, mtp=True)
