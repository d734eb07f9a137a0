"""The command line in this process, and checkpoints to search in."""

import pytest
import torch

from tests.cli.conftest import blockscale
from tests.evaluate.models import WORD_COUNT, WORDS, save_tokenizer, tiny_llama
from tests.model import models

__all__ = ["blockscale"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a BF16 checkpoint with weights larger than a block, and text.txt beside it."""
    folder = tmp_path_factory.mktemp("search") / "llama"
    sizes = {"hidden_size": 160, "intermediate_size": 208, "vocab_size": WORD_COUNT}
    tiny_llama(2, **sizes, initializer_range=0.08).to(torch.bfloat16).save_pretrained(folder)
    return with_text(folder)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory):
    """The same of a mixture of experts."""
    folder = tmp_path_factory.mktemp("search") / "deepseek"
    models.make(folder, initializer_range=0.05)
    return with_text(folder)


def with_text(folder):
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(WORDS)
    return folder
