"""A model of transformers of which only what is asked for is in memory; the rest is on the meta device.

Tensors are read from the checkpoint one at a time, and become parameters by the conversion of transformers
itself: renamed, merged, and of the dtypes that loading the whole model would give them. Buffers that no
checkpoint has, such as rotary frequencies, are there from the beginning: transformers computes them where it
initializes modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from blockscale.checkpoint.index import TensorEntry, read_index
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import dtype_of
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.huggingface.load import local_or_hub
from blockscale.huggingface.targets import made_of


@dataclass(frozen=True)
class PartialModel:
    """See the module.

    Attributes:
        model: in evaluation mode.
        source: the checkpoint.
        entries: its tensors.
        tensors: parameter or buffer of the model -> tensors of the checkpoint it is made of.
    """

    model: Any
    source: Source
    entries: Mapping[str, TensorEntry]
    tensors: Mapping[str, tuple[str, ...]]

    def load(self, names: Collection[str]) -> None:
        """Bring parameters and buffers into memory, on the CPU.

        Args:
            names: of a part of the model that shares no tensors with the rest.

        Raises:
            BlockscaleError: tensors are missing, or do not fit the model.
        """
        model = self.model
        wanted = [tensor for name in names for tensor in self.tensors.get(name, ())]
        state = {tensor: read_tensor(self.source, self.entries[tensor]) for tensor in wanted}
        config = LoadStateDictConfig(
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=get_model_conversion_mapping(model),
        )
        with no_bars():
            info, _ = convert_and_load_state_dict_in_model(model, state, config)
        if any(name in model.all_tied_weights_keys for name in names):
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        wrong = [*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)]
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        missing = [name for name in names if name in values and values[name].is_meta]
        if wrong or missing:
            raise BlockscaleError(
                "checkpoint does not fit the model of transformers",
                where=(wrong or missing)[0],
                expected="tensors that it is made of",
                got=f"others, for {len(wrong)} parameters"
                if wrong
                else f"none, for {len(missing)} parameters",
            )


def open_partial(source: Source) -> PartialModel:
    """A causal language model with all parameters on the meta device, of the dtype they are stored in.

    Raises:
        BlockscaleError: a source that transformers does not read.
    """
    entries = read_index(source).tensors
    place, options = local_or_hub(source)
    config = AutoConfig.from_pretrained(place, **options)
    dtype = getattr(config, "dtype", None) or _first_dtype(entries)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()  # what is on the meta device stays there
    found: dict[str, list[str]] = {}
    for tensor, name, _ in made_of(model, entries, model.state_dict()):
        found.setdefault(name, []).append(tensor)
    return PartialModel(model, source, entries, {name: tuple(each) for name, each in found.items()})


def read_tensor(source: Source, entry: TensorEntry) -> torch.Tensor:
    """A tensor of a checkpoint.

    Raises:
        CorruptCheckpointError: the file has become shorter.
    """
    raw = bytearray(source.read(entry.file, entry.start, entry.nbytes))
    if len(raw) != entry.nbytes:
        raise CorruptCheckpointError(
            "file became shorter while it was read", where=entry.file, remedy="fetch the file again"
        )
    dtype = dtype_of(entry)
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(entry.shape)


def parameters_outside(model: Any, prefix: str) -> list[str]:
    """Parameters and buffers in the checkpoint that hidden states before the layers `prefix` may depend on.

    Those of the output, which is the largest of the rest, are none, unless it shares them with the input.
    """
    output = model.get_output_embeddings()
    tied = model.all_tied_weights_keys
    skipped = set() if output is None or tied else {id(each) for each in output.parameters()}
    values = model.state_dict(keep_vars=True)
    return [
        name for name, each in values.items() if not name.startswith(f"{prefix}.") and id(each) not in skipped
    ]


def _first_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """As transformers has it where a config names none: that of the first floating-point tensor."""
    dtypes = (dtype_of(entry) for entry in entries.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())


@contextmanager
def no_bars() -> Iterator[None]:
    """Transformers draws no progress bars: one for every layer would be too many."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
