import pytest
import torch

from blockscale.calibrate.text import SELF, Calibration, cut_tokens, write_tokens
from blockscale.errors import BlockscaleError

transformers = pytest.importorskip("transformers")


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def tiny(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_pieces_are_spread_over_a_text():
    text = " ".join(map(str, range(100_000)))
    ids = cut_tokens(text, encode, 5, 100)
    assert ids.shape == (5, 100)
    assert ids[0, 0] == 0
    assert ids[-1, 0] > 99_000
    assert bool((ids[:, 1:-1].diff(dim=1) == 1).all())  # the first word of a piece may be cut
    assert bool((ids[:, 1].diff() > 20_000).all())


def test_a_text_that_just_suffices_is_taken_whole():
    text = " ".join(map(str, range(300)))
    assert torch.equal(cut_tokens(text, encode, 3, 100), torch.arange(300).view(3, 100))
    with pytest.raises(BlockscaleError, match=r"300.*got 299"):
        cut_tokens(" ".join(map(str, range(299))), encode, 3, 100)


def test_a_model_writes_by_what_it_predicts():
    model = tiny(bos_token_id=1, eos_token_id=2)
    ids = write_tokens(model, 300, 24, 0, "cpu")
    assert ids.shape == (300, 24)
    assert not bool((ids == 2).any())  # no row ends early
    assert torch.equal(ids, write_tokens(model, 300, 24, 0, "cpu"))
    assert not torch.equal(ids, write_tokens(model, 300, 24, 1, "cpu"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1]])).logits[0, 0]
        logits[2] = -torch.inf
        expected = logits.softmax(-1)
    counted = torch.bincount(ids[:, 0], minlength=16) / 300
    assert float((counted - expected).abs().max()) < 0.1


def test_what_was_written_is_kept_and_texts_share_alike(tmp_path):
    text = " ".join(["3"] * 1000)
    both = Calibration((SELF, text), encode, 200, 20)
    ids = both.token_ids(tiny, tmp_path / ".tokens", "cpu")
    assert ids.shape == (10, 20)
    assert [bool((row == 3).all()) for row in ids] == [False] * 5 + [True] * 5
    assert torch.equal(both.token_ids(torch.nn.Identity, tmp_path / ".tokens", "cpu"), ids)


def test_settings_tell_texts_apart():
    one, other = (Calibration((text, SELF), encode, 200, 20).settings() for text in ("a", "b"))
    assert one != other
    assert one["texts"][1] == other["texts"][1] == SELF


def test_a_model_that_predicts_nan_is_refused():
    model = tiny(bos_token_id=1, eos_token_id=2)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(BlockscaleError, match="predicts NaN or Inf"):
        write_tokens(model, 2, 4, 0, "cpu")
