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


def save_byte_tokenizer(folder):
    """A tokenizer of single bytes, 256 of them, that begins texts with 256 and ends them with 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(folder)
    return fast
