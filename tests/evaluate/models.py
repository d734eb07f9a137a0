"""Tiny models that stand for a reference and what was made from it."""

import torch
import transformers

VOCABULARY = 97


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
