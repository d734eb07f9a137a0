"""Peak memory is that of a few strips, not of a tensor: measured in a process of its own."""

import json
import subprocess
import sys

import pytest

from tests import data

MEGABYTE = 1 << 20
TENSOR = 320 * MEGABYTE
# Two threads with a strip in and a strip out each, and what the allocator keeps.
BOUND = 100 * MEGABYTE
SCRIPT = """
import json, resource, sys
from blockscale import RunOptions, dequantize_checkpoint, quantize_checkpoint, verify_checkpoint
from blockscale.checkpoint.shard import shard_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

run, peaks = RunOptions(workers=2, device="cpu"), {}
for size in ("small", "large"):
    folder = f"{sys.argv[1]}/{size}"
    report = quantize_checkpoint(f"{folder}/bf16", f"{folder}/fp8", run=run)
    peaks[f"{size} quantize"] = peak()
    assert verify_checkpoint(f"{folder}/fp8", f"{folder}/bf16", workers=2).ok
    peaks[f"{size} verify"] = peak()
    dequantize_checkpoint(f"{folder}/fp8", f"{folder}/back", run=run)
    peaks[f"{size} dequantize"] = peak()
    shard_checkpoint(f"{folder}/bf16", f"{folder}/mp2", 2, run=run)
    peaks[f"{size} convert"] = peak()
print(json.dumps(peaks))
"""


def _write(folder, linear_bytes, copied_bytes):
    """A checkpoint of zeros that takes no space on the disk: one linear weight and one embedding."""
    columns = 4096
    linear, copied = linear_bytes // (2 * columns), copied_bytes // (2 * columns)
    header = {
        "model.embed_tokens.weight": data.entry("BF16", [copied, columns], 0, copied_bytes),
        "model.layers.0.mlp.down_proj.weight": data.entry(
            "BF16", [linear, columns], copied_bytes, copied_bytes + linear_bytes
        ),
    }
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(file.write(data.raw_file(header)) + linear_bytes + copied_bytes)
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')


@pytest.mark.timeout(120)
def test_peak_memory_stays_far_below_the_largest_tensor(tmp_path):
    _write(tmp_path / "small" / "bf16", 2 * MEGABYTE, 2 * MEGABYTE)
    _write(tmp_path / "large" / "bf16", TENSOR, 64 * MEGABYTE)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout)
    base = peaks["small convert"]
    for step in ("quantize", "verify", "dequantize", "convert"):
        grown = peaks[f"large {step}"] - base
        assert grown < BOUND, (
            f"{step}: {grown / MEGABYTE:.0f} MB more for a tensor of {TENSOR / MEGABYTE:.0f} MB"
        )
