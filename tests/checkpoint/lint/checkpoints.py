"""Checkpoints for the tests of `lint`, and what it finds in them."""

from blockscale.checkpoint.lint.run import lint_checkpoint
from tests import data

ENGINES = ["vllm", "sglang", "transformers"]
SERVERS = ["vllm", "sglang"]
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
OUT, GATE, UP = f"{ATTENTION}o_proj", f"{MLP}gate_proj", f"{MLP}up_proj"
W, S = ".weight", ".weight_scale_inv"


def aligned(model, unit=256):
    """The model with every projection a multiple of 256 in both dimensions."""
    changes = {
        name: data.weight(name, *(-(-side // unit) * unit for side in each.shape))
        for name, each in model.tensors.items()
        if "_proj" in name
    }
    return model.changed(changes)


def write(folder, tensors, config):
    return data.write(folder, data.Model(tensors, config))


def findings(folder, engine, tp=1):
    return {
        (each.severity, each.rule, each.where) for each in lint_checkpoint(folder, engine, tp=tp).findings
    }
