"""`lint`: what we write for an engine is clean, and every planted defect is found, and nothing else."""

import json
import tempfile
from pathlib import Path

import fsspec
import pytest
import torch

from blockscale import Recipe, quantize_checkpoint
from blockscale.checkpoint.lint.run import lint_checkpoint
from tests import data

ENGINES = ["vllm", "sglang", "transformers"]
SERVERS = ["vllm", "sglang"]
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
OUT, GATE, UP = f"{ATTENTION}o_proj", f"{MLP}gate_proj", f"{MLP}up_proj"


def aligned(model, unit=256):
    """The model with every projection a multiple of 256 in both dimensions."""
    changes = {
        name: data.weight(name, *(-(-side // unit) * unit for side in each.shape))
        for name, each in model.tensors.items()
        if "_proj" in name
    }
    return model.changed(changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clean FP8 checkpoint of one file, to copy from."""
    folder = tmp_path_factory.mktemp("made")
    quantize_checkpoint(data.write(folder / "source", aligned(data.llama(2))), folder / "fp8")
    return data.read(folder / "fp8"), data.read_config(folder / "fp8")


def _write(folder, tensors, config):
    return data.write(folder, data.Model(tensors, config))


def _found(folder, engine, tp=1):
    return {
        (each.severity, each.rule, each.where) for each in lint_checkpoint(folder, engine, tp=tp).findings
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", [data.llama, data.deepseek_v3])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe("ue8m0")])
def test_what_we_write_by_default_is_clean(tmp_path, engine, model, recipe):
    quantize_checkpoint(data.write(tmp_path / "source", aligned(model())), tmp_path / "out", recipe)
    found = lint_checkpoint(tmp_path / "out", engine)
    assert found.findings == ()
    assert found.ok


@pytest.mark.parametrize(
    ("layout", "engine", "expected"),
    [
        ("w4afp8", "sglang", set()),
        ("w4afp8", "vllm", {("error", "method", "config.json")}),
        ("w4afp8", "transformers", {("error", "method", "config.json")}),
        ("compressed-tensors", "vllm", {("warning", "w4a8", "config.json")}),  # Hopper GPUs alone
        ("compressed-tensors", "transformers", set()),
        ("compressed-tensors", "sglang", {("error", "mixed-precision", "config.json format")}),
        ("blockscale", "vllm", {("error", "method", "config.json")}),
        ("blockscale", "sglang", {("error", "method", "config.json")}),
        ("blockscale", "transformers", {("error", "method", "config.json")}),
    ],
)
def test_layouts_with_int4_experts(tmp_path, layout, engine, expected):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    recipe = Recipe(layout=layout, precision={"default": "fp8", "experts": "int4:g128"})
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3()))
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert _found(tmp_path / "out", engine) == expected


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_fp8_in_compressed_tensors_is_clean(tmp_path, engine):
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", aligned(data.llama()))
    quantize_checkpoint(source, tmp_path / "out", Recipe(layout="compressed-tensors"))
    assert _found(tmp_path / "out", engine) == set()


def _drop(*names):
    return lambda tensors, entry: [tensors.pop(name) for name in names]


def _entry(**fields):
    return lambda tensors, entry: entry.update(fields)


def _high(name):
    """A weight back in BF16, without its scale, and not on the skip list."""

    def change(tensors, entry):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
        del tensors[f"{name}.weight_scale_inv"]

    return change


def _skip(*entries):
    return lambda tensors, entry: entry["modules_to_not_convert"].extend(entries)


def _cast(name, dtype):
    return lambda tensors, entry: tensors.update({name: tensors[name].to(dtype)})


def _both(*changes):
    return lambda tensors, entry: [change(tensors, entry) for change in changes]


W, S = ".weight", ".weight_scale_inv"
DEFECTS = {
    "no activation_scheme": (
        lambda tensors, entry: entry.pop("activation_scheme"),
        SERVERS,
        {("error", "activation-scheme", "config.json activation_scheme")},
    ),
    "static activations": (
        _entry(activation_scheme="static"),
        ENGINES,
        {("error", "activation-scheme", "config.json activation_scheme")},
    ),
    "scale_fmt null": (
        _entry(scale_fmt=None),
        ["transformers"],
        {("error", "scale-fmt", "config.json scale_fmt")},
    ),
    "scale_fmt misspelled": (
        _entry(scale_fmt="uf8m0"),
        SERVERS,
        {("warning", "scale-fmt", "config.json scale_fmt")},
    ),
    "no block size": (
        lambda tensors, entry: entry.pop("weight_block_size"),
        ENGINES,
        {("error", "config", "config.json")},
    ),
    "an unknown method": (_entry(quant_method="awq"), ENGINES, {("warning", "method", "config.json")}),
    "a scale is missing": (_drop(OUT + S), ENGINES, {("silent", "missing-scale", OUT + W)}),
    "a scale of another name": (
        lambda tensors, entry: tensors.update({f"{OUT}.weight_scale": tensors.pop(OUT + S)}),
        ENGINES,
        {("silent", "missing-scale", OUT + W)},
    ),
    "a weight is missing": (_drop(OUT + W), ENGINES, {("error", "stray-scale", OUT + S)}),
    "another grid": (
        lambda tensors, entry: tensors.update({OUT + S: torch.ones(1, 1)}),
        ENGINES,
        {("error", "scale-shape", OUT + S)},
    ),
    "scales in BF16": (_cast(OUT + S, torch.bfloat16), ENGINES, {("warning", "scale-dtype", OUT + S)}),
    "scales in bytes": (_cast(OUT + S, torch.uint8), ENGINES, {("silent", "scale-dtype", OUT + S)}),
    "scales in E8M0": (_cast(OUT + S, torch.float8_e8m0fnu), ENGINES, {("warning", "scale-dtype", OUT + S)}),
    "a BF16 weight that is not listed": (_high(OUT), ENGINES, {("silent", "unlisted", OUT + W)}),
    "a BF16 weight with a scale": (
        _both(_cast(OUT + W, torch.bfloat16), _skip(OUT)),
        ENGINES,
        {("silent", "stray-scale", OUT + S)},
    ),
    "an FP8 weight that is listed": (_skip(OUT), SERVERS, {("error", "skipped", OUT + W)}),
    "half of a merged layer is FP8": (
        _both(_high(GATE), _skip(GATE)),
        SERVERS,
        {("error", "merged-skip", GATE + W), ("error", "merged-precision", UP + W)},
    ),
    "an FP8 embedding": (
        _cast("model.embed_tokens.weight", torch.float8_e4m3fn),
        ENGINES,
        {
            ("error", "role", "model.embed_tokens.weight"),
            ("silent", "missing-scale", "model.embed_tokens.weight"),
        },
    ),
    "an entry of a part of a path": (_skip("layers.7"), ["vllm"], {("warning", "entry", "config.json")}),
    "no skip list": (
        lambda tensors, entry: entry.pop("modules_to_not_convert"),
        ENGINES,
        set(),  # transformers leaves the head alone by itself, the others always do
    ),
    "the head is not listed": (
        _entry(modules_to_not_convert=[]),
        ["transformers"],
        {("silent", "head", "lm_head")},
    ),
}  # fmt: skip
CASES = [(name, engine) for name, (_, engines, _) in DEFECTS.items() for engine in engines]


@pytest.mark.parametrize(("defect", "engine"), CASES)
def test_a_planted_defect_is_found_and_nothing_else(tmp_path, made, defect, engine):
    change, _, expected = DEFECTS[defect]
    tensors, config = dict(made[0]), json.loads(json.dumps(made[1]))
    change(tensors, config["quantization_config"])
    found = lint_checkpoint(_write(tmp_path / "bad", tensors, config), engine)
    assert {(each.severity, each.rule, each.where) for each in found.findings} == expected
    assert found.ok == all(severity == "warning" for severity, _, _ in expected)


def test_what_the_skip_list_of_each_engine_matches(tmp_path, made):
    tensors, config = dict(made[0]), json.loads(json.dumps(made[1]))
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "layers.1", "down_proj", "mlp.gate"]
    folder = _write(tmp_path / "bad", tensors, config)
    down = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    first = {name for name in tensors if name.startswith("model.layers.1.") and name.endswith("_proj.weight")}

    def skipped(engine):
        return {each.where for each in lint_checkpoint(folder, engine).findings if each.rule == "skipped"}

    assert skipped("vllm") == set()  # full paths alone
    assert skipped("sglang") == down | first  # whole segments anywhere: mlp.gate is not mlp.gate_proj
    assert skipped("transformers") == down  # from the start, or the end


def test_transformers_matches_as_its_own_code_does():
    module = pytest.importorskip("transformers.quantizers.quantizers_utils")
    from blockscale.checkpoint.lint.skipping import first_match, matcher

    names = ["model.layers.1.mlp.gate", "model.layers.10.mlp.gate_proj", "lm_head", "model.layers.1", "fc1"]
    entries = [
        "model.layers.1",
        "layers.1",
        "mlp.gate",
        "gate",
        "model.layers.*.mlp",
        "lm_head",
        "head",
        "c1",
        "m.",
    ]
    for name in names:
        for entry in entries:
            ours = first_match(matcher("transformers", "fp8"), [entry], name) is None
            assert ours == module.should_convert_module(name, [entry]), (name, entry)


def test_transformers_parses_what_is_clean_and_refuses_what_is_not(made):
    transformers = pytest.importorskip("transformers")
    entry = made[1]["quantization_config"]
    transformers.FineGrainedFP8Config(**entry)
    for value in (None, "uf8m0", "float32"):
        with pytest.raises(ValueError, match="scale_fmt"):
            transformers.FineGrainedFP8Config(**entry, scale_fmt=value)


@pytest.mark.parametrize(("rows", "severity"), [(192, "silent"), (576, "error"), (100, None), (256, None)])
def test_ragged_rows_in_transformers(tmp_path, made, rows, severity):
    tensors, config = dict(made[0]), made[1]
    tensors[OUT + W] = torch.zeros(rows, 256).to(torch.float8_e4m3fn)
    tensors[OUT + S] = torch.ones(-(-rows // 128), 2)
    found = _found(_write(tmp_path / "bad", tensors, config), "transformers")
    assert found == (set() if severity is None else {(severity, "ragged", OUT + W)})


@pytest.mark.parametrize("engine", SERVERS)
def test_a_merged_layer_may_be_ragged_in_its_last_part_alone(tmp_path, made, engine):
    for name, expected in ((GATE, {("error", "merged-rows", GATE + W)}), (UP, set())):
        tensors = dict(made[0])
        tensors[name + W] = torch.zeros(192, 256).to(torch.float8_e4m3fn)
        tensors[name + S] = torch.ones(2, 2)
        assert _found(_write(tmp_path / name, tensors, made[1]), engine) == expected


@pytest.mark.parametrize("engine", SERVERS)
def test_ranks_cut_at_blocks(tmp_path, made, engine):
    folder = _write(tmp_path / "out", *made)
    assert _found(folder, engine, tp=2) == set()
    names = {where for _, rule, where in _found(folder, engine, tp=4) if rule == "tensor-parallel"}
    # 256 rows or inputs are 2 blocks; the MLP has 512 of them.
    assert OUT + W in names
    assert GATE + W not in names
    assert all(name.startswith("model.layers.") for name in names)


def test_blocks_of_another_size_are_told(tmp_path):
    quantize_checkpoint(
        data.write(tmp_path / "source", aligned(data.llama())), tmp_path / "out", Recipe(block_size=(64, 64))
    )
    for engine in SERVERS:
        assert _found(tmp_path / "out", engine) == {("warning", "block-size", "config.json")}


def test_vllm_refuses_experts_that_its_w4a8_kernels_cannot_cut(tmp_path):
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3(), 128))
    recipe = Recipe(layout="compressed-tensors", precision={"default": "fp8", "experts": "int4:g128"})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    found = lint_checkpoint(tmp_path / "out", "vllm")
    assert not found.ok
    assert {each.rule for each in found.findings} == {"w4a8"}
    quantize_checkpoint(
        source,
        tmp_path / "g64",
        Recipe(layout="compressed-tensors", precision={"default": "fp8", "experts": "int4:g64"}),
    )
    assert lint_checkpoint(tmp_path / "g64", "vllm").findings == ()  # the remedy it names


W4AFP8 = {
    "no input scale": (
        lambda tensors, name: tensors.pop(f"{name}.input_scale"),
        {("warning", "w4afp8", "{}.weight")},
    ),
    "an input scale in F32": (
        lambda tensors, name: tensors.update({f"{name}.input_scale": torch.ones(1)}),
        {("warning", "w4afp8", "{}.input_scale")},
    ),
    "unpacked": (
        lambda tensors, name: tensors.update({f"{name}.weight": torch.zeros(256, 256, dtype=torch.int8)}),
        {("error", "scale-shape", "{}.weight_scale_inv")},
    ),
    "another expert in FP8": (
        lambda tensors, name: tensors.update(
            {
                f"{name}.weight": torch.zeros(256, 256).to(torch.float8_e4m3fn),
                f"{name}.weight_scale_inv": torch.ones(2, 2),
            }
        ),
        {("error", "w4afp8", "{}.weight"), ("error", "merged-precision", "{}.weight")},
    ),
    "no scales": (
        lambda tensors, name: tensors.pop(f"{name}.weight_scale_inv"),
        {("silent", "missing-scale", "{}.weight")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", W4AFP8)
def test_defects_of_w4afp8(tmp_path, defect):
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3()))
    recipe = Recipe(layout="w4afp8", precision={"default": "fp8", "experts": "int4:g128"})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    tensors, name = data.read(tmp_path / "out"), "model.layers.1.mlp.experts.2.up_proj"
    change, expected = W4AFP8[defect]
    change(tensors, name)
    folder = _write(tmp_path / "bad", tensors, data.read_config(tmp_path / "out"))
    found = _found(folder, "sglang")
    assert found == {(severity, rule, where.format(name)) for severity, rule, where in expected}


def test_sglang_reads_no_skip_list_of_w4afp8(tmp_path):
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3()))
    precision = {"default": "fp8", "experts": "int4:g128", "shared_experts": "bf16"}
    quantize_checkpoint(source, tmp_path / "out", Recipe(layout="w4afp8", precision=precision))
    found = _found(tmp_path / "out", "sglang")
    assert {(severity, rule) for severity, rule, _ in found} == {("silent", "unlisted")}
    assert len(found) == 6  # three shared projections of two layers


def test_what_engines_know_and_we_do_not_is_not_called_wrong(tmp_path, made):
    per_tensor = {name: each for name, each in made[0].items() if not name.endswith("_scale_inv")}
    config = json.loads(json.dumps(made[1]))
    del config["quantization_config"]["weight_block_size"]
    found = lint_checkpoint(_write(tmp_path / "tensor", per_tensor, config), "vllm")
    assert {(each.severity, each.rule) for each in found.findings} == {("warning", "config")}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}},
        "ignore": ["lm_head"],
    }
    codes = {
        name: torch.zeros(each.shape, dtype=torch.int8) if "_proj" in name else each
        for name, each in per_tensor.items()
    }
    found = lint_checkpoint(_write(tmp_path / "int8", codes, config), "vllm")
    assert {(each.severity, each.rule) for each in found.findings} == {("warning", "config")}


def test_what_no_config_group_names_is_left_alone(tmp_path):
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", aligned(data.llama()))
    quantize_checkpoint(source, tmp_path / "out", Recipe(layout="compressed-tensors", exclude=("*.o_proj",)))
    tensors, config = data.read(tmp_path / "out"), data.read_config(tmp_path / "out")
    entry = config["quantization_config"]
    entry["ignore"] = ["lm_head"]
    assert _found(_write(tmp_path / "all", tensors, config), "vllm") == {("silent", "unlisted", OUT + W)}
    entry["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*", "re:.*[qkv]_proj$"]
    assert _found(_write(tmp_path / "named", tensors, config), "vllm") == set()
    entry["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    found = {where for _, rule, where in _found(_write(tmp_path / "fewer", tensors, config), "vllm")}
    assert found == {f"{ATTENTION}{leaf}_proj.weight" for leaf in "qkv"}


def test_a_remote_checkpoint(made):
    folder = "memory://lint/out"
    store = fsspec.filesystem("memory")
    with tempfile.TemporaryDirectory() as here:
        for name, content in data.contents(_write(Path(here), *made)).items():
            store.pipe(f"/lint/out/{name}", content)
    assert lint_checkpoint(folder, "vllm").ok


def test_stale_and_missing_declarations(tmp_path, made):
    source = aligned(data.llama())
    stale = {**source.config, "quantization_config": made[1]["quantization_config"]}
    rules = {rule for _, rule, _ in _found(_write(tmp_path / "stale", source.tensors, stale), "vllm")}
    assert "stale" in rules
    bare = {key: value for key, value in made[1].items() if key != "quantization_config"}
    assert _found(_write(tmp_path / "bare", made[0], bare), "vllm") == {("silent", "declared", "config.json")}


def test_a_missing_mtp_layer(tmp_path):
    model = aligned(data.deepseek_v3())
    gone = {name: None for name in model.tensors if ".layers.2." in name}
    quantize_checkpoint(data.write(tmp_path / "source", model.changed(gone)), tmp_path / "out")
    assert _found(tmp_path / "out", "vllm") == {("warning", "mtp", "model.layers.2")}


def test_an_index_that_names_absent_files(tmp_path, made):
    folder = data.write(tmp_path / "out", data.Model(*made), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (finding,) = lint_checkpoint(folder, "vllm").findings
    assert (finding.severity, finding.rule) == ("error", "index")
    assert "files that the index names are absent" in finding.what


def test_values_that_make_no_sense(tmp_path, made):
    folder = _write(tmp_path / "out", *made)
    assert "unknown engine (expected vllm | sglang | transformers" in data.told(
        lint_checkpoint, folder, "ollama"
    )
    with pytest.raises(Exception, match="bad number of ranks"):
        lint_checkpoint(folder, "vllm", tp=0)
