"""Small checkpoints for tests, made and read by safetensors' own code: never by the code under test."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blockscale import reference
from blockscale.errors import BlockscaleError

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
TINY_DEEPSEEK = Path(__file__).parent.parent.parent / "shared" / "models" / "tiny-deepseek-v3"


@dataclass(frozen=True)
class Model:
    """Tensors and config.json of a checkpoint, and other files to lie beside them."""

    tensors: Tensors
    config: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    def with_tensors(self, **changes: torch.Tensor | None) -> Model:
        """Changed by name (`__` for a dot); None takes a tensor away."""
        return self.changed({name.replace("__", "."): value for name, value in changes.items()})

    def changed(self, changes: Mapping[str, torch.Tensor | None], **config: Any) -> Model:
        tensors = {name: value for name, value in {**self.tensors, **changes}.items() if value is not None}
        settings = {key: value for key, value in {**self.config, **config}.items() if value is not None}
        return replace(self, tensors=tensors, config=settings)


CARRIED = {
    "tokenizer.json": b'{"model": "\xc3\xa9"}\r\n',
    "generation_config.json": b'{"temperature": 0.6}',
    "modeling_custom.py": b"raise SystemExit('remote code was run')\n",
    "chat_template.jinja": b"{{ messages }}",
    "assets/figures/logo.png": bytes(range(256)),
    "1_Pooling/config.json": b'{"nested": true}',
    "empty.txt": b"",
}


def weight(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Gaussian values that depend on the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def _named(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    return {name: weight(name, *shape, dtype=dtype) for name, shape in shapes.items()}


def llama(
    layers: int = 1,
    hidden: int = 192,
    intermediate: int = 320,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    model_type: str = "llama",
) -> Model:
    """A dense model whose dimensions are no multiples of 128."""
    vocabulary, kv = 64, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    return Model(_named(shapes, dtype), config, dict(CARRIED))


def deepseek_v3(heads: int = 2, hidden: int = 160, width: int = 72) -> Model:
    """Every kind of tensor of DeepSeek-V3: a dense and a sparse layer, and an MTP module as layer 2."""
    rank, kv_rank, experts, vocabulary = 96, 64, 4, 48
    norms = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    attention = {
        "self_attn.q_a_proj.weight": (rank, hidden),
        "self_attn.q_a_layernorm.weight": (rank,),
        "self_attn.q_b_proj.weight": (heads * 48, rank),
        "self_attn.kv_a_proj_with_mqa.weight": (kv_rank + 16, hidden),
        "self_attn.kv_a_layernorm.weight": (kv_rank,),
        "self_attn.kv_b_proj.weight": (heads * 64, kv_rank),
        "self_attn.o_proj.weight": (hidden, heads * 32),
    }

    def mlp(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (size, hidden),
            f"{prefix}up_proj.weight": (size, hidden),
            f"{prefix}down_proj.weight": (hidden, size),
        }

    sparse: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts, hidden)}
    for expert in range(experts):
        sparse |= mlp(f"mlp.experts.{expert}.", width)
    sparse |= mlp("mlp.shared_experts.", width)
    extras = {
        "embed_tokens.weight": (vocabulary, hidden),
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocabulary, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer, parts in enumerate(({**mlp("mlp.", 200)}, sparse, {**sparse, **extras})):
        shapes |= {
            f"model.layers.{layer}.{name}": shape for name, shape in (norms | attention | parts).items()
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    tensors = _named(shapes, torch.bfloat16)
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        tensors[name] = weight(name, experts, dtype=torch.float32)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 200,
        "moe_intermediate_size": width,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Model(tensors, config, dict(CARRIED))


def deepseek_v2(heads: int = 2) -> Model:
    """As DeepSeek-V2-Lite: no low-rank queries, no correction bias, no MTP module."""
    model = deepseek_v3(heads)
    gone = {name: None for name in model.tensors if ".layers.2." in name or ".q_" in name}
    gone |= {name: None for name in model.tensors if name.endswith("e_score_correction_bias")}
    queries = {f"model.layers.{layer}.self_attn.q_proj.weight": (heads * 48, 160) for layer in (0, 1)}
    config = {"model_type": "deepseek_v2", "q_lora_rank": None, "num_nextn_predict_layers": None}
    return model.changed(gone | _named(queries, torch.bfloat16), **config)


def fused_experts(model_type: str, axes: str) -> Model:
    """One layer with 3 fused experts, stored (E, out, in) for axes "nk" and (E, in, out) for "kn"."""
    hidden, width, prefix = 96, 80, "model.layers.0."
    sizes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, hidden)}
    for leaf, (rows, columns) in sizes.items():
        shapes[f"{prefix}mlp.experts.{leaf}"] = (3, rows, columns) if axes == "nk" else (3, columns, rows)
        shapes[f"{prefix}mlp.experts.{leaf}_bias"] = (3, rows)
    shapes |= {f"{prefix}self_attn.{leaf}_proj.weight": (hidden, hidden) for leaf in "qkvo"}
    shapes[f"{prefix}mlp.router.weight"] = (3, hidden)
    return Model(_named(shapes, torch.bfloat16), {"model_type": model_type, "num_hidden_layers": 1})


def in_fp8(
    model: Model,
    names: Iterable[str] | None = None,
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "float32",
    **quantization: Any,
) -> Model:
    """The model as block FP8, DeepSeek layout, by the reference quantizer; by default all projections."""
    chosen = [name for name in model.tensors if "_proj" in name] if names is None else list(names)
    tensors = dict(model.tensors)
    for name in chosen:
        codes, scale = reference.quantize_weight(model.tensors[name], block_size, scale_fmt)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
    entry = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    entry |= {"weight_block_size": list(block_size), **quantization}
    if scale_fmt == "ue8m0":
        entry["scale_fmt"] = "ue8m0"
    return replace(model, tensors=tensors, config={**model.config, "quantization_config": entry})


def write(
    folder: Path,
    model: Model,
    shards: int | Mapping[str, str] | None = None,
    *,
    file: str = "model.safetensors",
    metadata: dict[str, str] | None = None,
    index_metadata: dict[str, Any] | None = None,
) -> Path:
    """Write one file, `shards` files with neighbours apart, or the files that a name -> file mapping says."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    if shards is None:
        save_file(model.tensors, folder / file, metadata)
    else:
        if isinstance(shards, int):
            shards = {
                name: f"model-{place % shards + 1:05d}-of-{shards:05d}.safetensors"
                for place, name in enumerate(model.tensors)
            }
        for shard in sorted(set(shards.values())):
            save_file(
                {n: t for n, t in model.tensors.items() if shards[n] == shard}, folder / shard, metadata
            )
        total = sum(tensor.nbytes for tensor in model.tensors.values())
        index = {"metadata": {"total_size": total, **(index_metadata or {})}, "weight_map": dict(shards)}
        (folder / INDEX).write_text(json.dumps(index))
    for name, content in model.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    return folder


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, through its index if there is one."""
    files = [folder / "model.safetensors"]
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = [folder / file for file in sorted(set(weight_map.values()))]
    tensors: Tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in sorted(file.keys())}
    return tensors


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Apply `change` to the tensors of a single-file checkpoint."""
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file, hidden ones too; empty if the folder is absent."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Relative path -> (SHA-256, time of change) of every file."""
    return {
        name: (hashlib.sha256(data).hexdigest(), (folder / name).stat().st_mtime_ns)
        for name, data in contents(folder).items()
    }


def raw_file(
    header: Mapping[str, Any] | list[Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """The bytes of a safetensors file with any header and any stated header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object, shape: object, start: object, end: object) -> dict[str, Any]:
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(
    action: Callable[[], object],
    source: Path,
    destination: Path | None = None,
    *,
    keeps_shards: bool = False,
) -> str:
    """The one line that `action` refuses with; the source and the destination must be as they were.

    With `keeps_shards` finished shards must lie in the hidden working folder, for the next run.
    """
    before = snapshot(source), contents(destination) if destination else {}
    existed = destination is not None and destination.exists()
    with pytest.raises(BlockscaleError) as caught:
        action()
    after = snapshot(source), contents(destination) if destination else {}
    if keeps_shards:
        assert any(name.startswith(".blockscale/staging/") for name in after[1])
        after = (
            after[0],
            {name: data for name, data in after[1].items() if not name.startswith(".blockscale/")},
        )
    else:
        assert (destination is not None and destination.exists()) == existed
    assert after == before
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


def told(action: Callable[..., object], *arguments: object) -> str | None:
    """The line that `action` refuses with, or None if it does not; any other exception is a failure."""
    try:
        action(*arguments)
    except BlockscaleError as error:
        return str(error)
    return None
