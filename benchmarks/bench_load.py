"""How long a quantized checkpoint takes to load, against reading its files, and the host memory it takes.

    python benchmarks/bench_load.py [--layers 8] [--device cuda] [--folder DIR]

Writes an FP8 checkpoint of the 16B shape with random bytes (5 GB with 8 layers), drops it from the page cache
before every round, and times in turn: reading all files in pieces of 16 MiB, and `load_model`. Host memory is
the anonymous memory of the process at its most, above what it was before: mapped file pages come and go.
Results go to benchmarks/results/load.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.shapes import parameters_of
from blockscale.formats import BlockFP8, scale_name
from blockscale.model.config import load_config
from blockscale.model.load import load_model
from blockscale.testing.bench import append_result, environment

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "load.jsonl"
CONFIG = HERE.parent / "inference" / "configs" / "config_16B.json"
QUANTIZED = ("attention", "dense_mlp", "shared_experts", "experts")
FILE_BYTES = 1 << 30
PIECE = 1 << 24
ROUNDS = 3


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write it in files of about a gigabyte; bytes of its largest tensor."""
    config = load_config(CONFIG).model_copy(update={"num_hidden_layers": layers})
    ours = {"precision", "dtype", "scale_fmt", "weight_block_size"}
    values = config.model_dump(mode="json", exclude=ours, exclude_none=True)
    values |= {"model_type": "deepseek_v2", "q_lora_rank": config.q_lora_rank}
    values["rope_scaling"] |= {"type": "yarn"}
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    pending: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    largest = 0

    def flush() -> None:
        name = f"model-{len(set(files.values())):05d}.safetensors"
        save_file(pending, folder / name)
        files.update(dict.fromkeys(pending, name))
        pending.clear()

    for name, (_, shape) in parameters_of(values).items():
        if role_of(name) in QUANTIZED and len(shape) == 2:
            pending[name] = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
            pending[scale_name(name)] = torch.rand(BlockFP8().scale_shape(shape)) / math.sqrt(shape[-1])
        else:
            pending[name] = torch.rand(shape).bfloat16()
        largest = max(largest, pending[name].nbytes)
        if sum(tensor.nbytes for tensor in pending.values()) > FILE_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return largest


def drop(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Read every file once."""
    buffer = bytearray(PIECE)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Watch:
    """The most anonymous memory while it is open, above what there was at its start."""

    def __enter__(self) -> Watch:
        self.base, self.most, self._done = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, anonymous() - self.base)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    """Make the checkpoint, time both, and append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        largest = make_checkpoint(folder, arguments.layers)
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        seconds: dict[str, list[float]] = {"read": [], "load": []}
        memory = []
        load_model(folder, device=arguments.device)  # kernels, and the device's own memory on the host
        for _ in range(ROUNDS):
            drop(folder)
            start = time.perf_counter()
            read_all(folder)
            seconds["read"].append(time.perf_counter() - start)
            drop(folder)
            with Watch() as watch:
                start = time.perf_counter()
                load_model(folder, device=arguments.device)
                if arguments.device == "cuda":
                    torch.cuda.synchronize()
                seconds["load"].append(time.perf_counter() - start)
            memory.append(watch.most)
    record = {
        "benchmark": "load",
        "layers": arguments.layers,
        "device": arguments.device,
        "bytes": total,
        "largest_tensor_bytes": largest,
        "seconds": seconds,
        "anonymous_host_bytes": memory,
        **environment(),
    }
    append_result(RESULTS, record)
    rates = {key: total / statistics.median(values) / 1e9 for key, values in seconds.items()}
    print(f"{total / 1e9:.1f} GB: " + ", ".join(f"{key} {rate:.2f} GB/s" for key, rate in rates.items()))
    print(f"host memory {max(memory) / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
