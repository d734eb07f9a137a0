"""Tiny models that stand for a reference and what was made from it."""

import torch
import transformers

VOCABULARY = 97
WORD_COUNT = 320


def tiny_llama(seed, **changes):
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,  # far from uniform predictions, so that a shifted target is seen
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | changes)).eval()


def random_tokens(count, seed=0, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


WORDS = " ".join(f"w{token}" for token in random_tokens(400, vocabulary=WORD_COUNT).tolist())


def save_tokenizer(folder, shift=0):
    """A tokenizer of words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{(number + shift) % WORD_COUNT}": number for number in range(WORD_COUNT)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
