"""Prepared models for tests, and a few steps of training."""

from __future__ import annotations

import pytest
import torch

from blockscale.checkpoint.recipe import Recipe
from blockscale.qat import QatOptions, prepare

checkpoints = pytest.importorskip("tests.huggingface.checkpoints")

RECIPES = {
    "fp8": Recipe(),
    "narrow": Recipe(block_size=(64, 32)),
    "ue8m0": Recipe(scale_fmt="ue8m0"),
    "w4a8": Recipe(layout="blockscale", precision={"default": "fp8", "experts": "int4:g32"}),
    "int3": Recipe(layout="blockscale", precision={"default": "int3:g64"}),
    "mxfp4": Recipe(scale_fmt="ue8m0", layout="blockscale", precision={"default": "mxfp4"}),
}


def prepared(folder, recipe, scales="dynamic", **options):
    """The model of a checkpoint in float32, prepared."""
    initial = options.pop("initial", None)
    model = checkpoints.plain(folder)
    return prepare(model, RECIPES[recipe], QatOptions(scales, **options), initial=initial)


def train(model, steps=3, rate=3e-3):
    """Steps towards predicting the tokens of the tests; the losses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(checkpoints.TOKENS, labels=checkpoints.TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
