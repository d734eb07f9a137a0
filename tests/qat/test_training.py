"""A few steps through the rounding win back part of what plain rounding loses."""

import pytest
import torch

from tests.qat.models import checkpoints, prepared


def tokens(rows, seed):
    return torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(seed))


def divergence(teacher, model, ids):
    wanted, found = (each(ids).logits.log_softmax(-1) for each in (teacher, model))
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


@pytest.mark.parametrize("scales", ["dynamic", "frozen", "learned"])
@pytest.mark.parametrize(("name", "recipe"), [("llama", "int3"), ("deepseek_v3", "int3")])
def test_distillation_closes_part_of_the_gap(tmp_path, name, recipe, scales):
    source = checkpoints.make(tmp_path / "source", name, initializer_range=0.05)
    teacher = checkpoints.plain(source).requires_grad_(False)
    model = prepared(source, recipe, scales)
    held_out = tokens(32, 1)
    with torch.no_grad():
        plain = float(divergence(teacher, model, held_out))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    for step in range(30):
        ids = tokens(16, 100 + step)
        loss = divergence(teacher, model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = float(divergence(teacher, model, held_out))
    assert trained < 0.6 * plain
