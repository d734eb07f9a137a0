"""Options that several subcommands share, spelled once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

Src = Annotated[
    str, typer.Argument(help="Checkpoint folder, Hub repo id (org/name[@revision]) or fsspec URL.")
]
Dst = Annotated[str, typer.Argument(help="Folder or fsspec URL for the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Also write a page with charts and tables there."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads; by default one a core and two more.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the checkpoint or unfinished run at DST.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Cluster = Annotated[str | None, typer.Option(help="Spread shards over a Ray cluster: auto, or its address.")]
Include = Annotated[list[str] | None, typer.Option(help="Quantize only tensors that match (repeatable).")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave tensors that match alone (repeatable).")]
Precision = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE=fp8|fp8:ROWSxCOLUMNS|bf16",
        help="Precision of attention, dense_mlp, shared_experts, experts or head, of what matches a pattern, "
        "or of the rest: default=... (repeatable).",
    ),
]
BlockSize = Annotated[
    str | None,
    typer.Option(
        metavar="ROWSxCOLUMNS|auto",
        help="Rows x columns that share a scale; 128x128 by default; auto chooses by the weights' values.",
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="fp8, w4a8 or mxfp4a8 (experts in 4 bits, the rest FP8), budget:SIZE (8, 4 and 3 bits, so that "
        "all is at most that large: 340GB, 0.25x), or a JSON file with scale_fmt, block_size, layout, "
        "include, exclude, precision.",
    ),
]


Calibrate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|self",
        help="Round so that outputs stay as they were on this text (.xz and .bz2 too), or on what the model "
        "writes itself (repeatable: each gives an equal share).",
    ),
]
CalibrationTokens = Annotated[
    int | None,
    typer.Option(min=1024, help="Tokens of all calibration texts; 131072 by default, in sequences of 1024."),
]


class ScaleFmtChoice(str, Enum):
    """Values of --scale-fmt."""

    float32 = "float32"
    ue8m0 = "ue8m0"


class LayoutChoice(str, Enum):
    """Values of --layout."""

    deepseek = "deepseek"
    compressed_tensors = "compressed-tensors"
    w4afp8 = "w4afp8"
    blockscale = "blockscale"


class DeviceChoice(str, Enum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ComputeChoice(str, Enum):
    """Values of --compute."""

    auto = "auto"
    fp8 = "fp8"
    bf16 = "bf16"


COMPUTE: dict[ComputeChoice, Literal["fp8", "high"] | None] = {
    ComputeChoice.auto: None,
    ComputeChoice.fp8: "fp8",
    ComputeChoice.bf16: "high",
}


class KeepChoice(str, Enum):
    """Values of --on-nonfinite, --on-missing-scale."""

    error = "error"
    keep = "keep"


class DtypeChoice(str, Enum):
    """Values of --dtype."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


ScaleFmt = Annotated[
    ScaleFmtChoice | None, typer.Option(help="float32 (default), or ue8m0 for powers of two.")
]
Layout = Annotated[
    LayoutChoice | None, typer.Option(help="On-disk names and quantization_config; deepseek by default.")
]
Device = Annotated[
    DeviceChoice, typer.Option(help="Where the arithmetic runs; auto takes a GPU that is there.")
]
OnNonfinite = Annotated[
    KeepChoice, typer.Option(help="Weights with NaN or Inf: refuse, or keep as they are.")
]
OnMissingScale = Annotated[
    KeepChoice, typer.Option(help="FP8 weights without scale: refuse, or keep as they are.")
]
Compute = Annotated[
    ComputeChoice, typer.Option(help="bf16 multiplies FP8 weights with unquantized activations.")
]
DebugGemm = Annotated[
    bool,
    typer.Option(
        "--debug-gemm",
        help="Check every FP8 and 4-bit GEMM against float32, and say where precision is lost; slow.",
    ),
]
Dtype = Annotated[DtypeChoice, typer.Option(help="Dtype of the result's weights.")]
