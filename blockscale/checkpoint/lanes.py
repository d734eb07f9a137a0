"""Strips on their way through a GPU, while the strip before is written and the next one is read.

    file -> pinned memory -> GPU memory -> computed -> GPU memory -> pinned memory -> hashed, written

A worker takes a lane of `_SLOTS` slots. A slot has its own buffers and its own CUDA stream, on which the copy
there, the kernels and the copy back follow each other; nothing orders streams among themselves. So the GPU
copies both ways and computes at once, for other slots of this lane and of the other workers' lanes, while the
threads read, hash and write. A worker waits once a strip, for the event behind the copy back; whatever the
kernels have to say about the values (a flag for NaN) comes with the results.

Memory: a strip has at most `STRIP_VALUES` (4 Mi) values, or one row of blocks if that is more. A lane holds
`_SLOTS` (2) times a strip, its scales and its result in GPU memory, and the same in pinned memory, where
PyTorch rounds buffers up to powers of two: 2 x 12 MiB of GPU and 2 x 16 MiB of pinned memory a worker for
BF16 weights in 128 x 128 blocks, whatever the size of tensor, shard and model.

With "cpu:0" for a device the processor stands in for a GPU: same steps, in order, no streams.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from blockscale.checkpoint.strips import Span
from blockscale.errors import BlockscaleError

# Large enough that a strip's dozen calls into Python cost little, of which one thread at a time can make one.
STRIP_VALUES = 4 << 20
# One strip is with the GPU while the thread has the other, which takes it longer.
_SLOTS = 2
# Kernels are compiled for addresses that are multiples of 16; copies like whole lines of memory.
_ALIGNMENT = 256

Part = tuple[tuple[int, ...], torch.dtype]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Work:
    """What happens to a strip.

    Attributes:
        parts: shapes and dtypes of what goes to the GPU, and of what comes back.
        load: fills the first, in pinned memory.
        compute: launches kernels on the current stream, from the first to the second, on the GPU.
    """

    parts: Callable[[Span], tuple[Sequence[Part], Sequence[Part]]]
    load: Callable[[Span, Tensors], None]
    compute: Callable[[Tensors, Tensors], None]


@dataclass
class Buffer:
    """As many bytes here, pinned, as on the device; grows to what is asked for."""

    device: torch.device
    here: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    there: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def reserve(self, nbytes: int) -> None:
        if nbytes <= self.here.numel():
            return
        pinned = self.device.type == "cuda"
        self.here = self.there = torch.empty(0, dtype=torch.uint8)  # or both sizes would be held at once
        self.here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.there = torch.empty(nbytes, dtype=torch.uint8, device=self.device)


@dataclass(frozen=True)
class Slot:
    """A place for one strip and its result, the stream both travel on, and the event behind the result."""

    inputs: Buffer
    outputs: Buffer
    stream: torch.cuda.Stream | None = None
    landed: torch.cuda.Event | None = None

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()


@dataclass
class Lanes:
    """The lanes of a run on one device, made as workers ask for them.

    Attributes:
        device: with its index: a new thread would take GPU 0 otherwise.
        turn: held while a strip is launched, so that a kernel is compiled once and not by every worker.
        free: lanes that no worker has.
    """

    device: torch.device
    turn: threading.Lock = field(default_factory=threading.Lock)
    free: list[tuple[Slot, ...]] = field(default_factory=list)

    @contextmanager
    def take(self) -> Iterator[tuple[Slot, ...]]:
        """A lane; after an error it does not come back, as its copies may still be under way."""
        with self.turn:
            lane = self.free.pop() if self.free else tuple(_new_slot(self.device) for _ in range(_SLOTS))
        yield lane
        with self.turn:
            self.free.append(lane)


def usable_device(device: str) -> str:
    """Where "auto", "cpu" or "cuda" runs here: "cpu" or "cuda"; auto takes a GPU that is there.

    Raises:
        BlockscaleError: unknown device, no GPU, or one on which nothing can be run.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise BlockscaleError("unknown device", expected="auto | cpu | cuda", got=repr(device))
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        got = f"PyTorch {torch.__version__}, which " + ("finds none" if built else "is built without CUDA")
        raise _unusable("no CUDA device", got)
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        raise _unusable("the GPU cannot be used", _first_line(error)) from error
    return "cuda"


def open_lanes(device: str) -> Lanes | None:
    """Lanes to a device, the calling thread's GPU for "cuda"; None for "cpu", where strips stay in place."""
    if device == "cpu":
        return None
    if device == "cuda":
        usable_device(device)
        return Lanes(torch.device("cuda", torch.cuda.current_device()))
    return Lanes(torch.device(device))


def through(lanes: Lanes, spans: Iterable[Span], work: Work) -> Iterator[tuple[Span, Tensors, Tensors]]:
    """Send strips through the device, in order; yields each with what went there and what came back.

    Both are pinned memory, and stay as they are until the next step.

    Raises:
        BlockscaleError: the device is out of memory.
    """
    flying: deque[tuple[Span, Slot]] = deque()
    with lanes.take() as lane:
        waiting = deque(lane)
        for span in spans:
            if not waiting:
                yield _landed(*flying[0], work)
                waiting.append(flying.popleft()[1])
            slot = waiting.popleft()
            _launch(lanes, slot, span, work)
            flying.append((span, slot))
        while flying:
            yield _landed(*flying.popleft(), work)


def _new_slot(device: torch.device) -> Slot:
    if device.type != "cuda":
        return Slot(Buffer(device), Buffer(device))
    # The waiting thread sleeps: one that asks again and again takes a core from those that hash.
    landed = torch.cuda.Event(blocking=True)
    return Slot(Buffer(device), Buffer(device), torch.cuda.Stream(device), landed)


def _launch(lanes: Lanes, slot: Slot, span: Span, work: Work) -> None:
    inputs, outputs = work.parts(span)
    sent, returned = _size(inputs), _size(outputs)
    with _told(lanes.device), slot.current():
        slot.inputs.reserve(sent)
        slot.outputs.reserve(returned)
    work.load(span, _views(slot.inputs.here, inputs))
    with _told(lanes.device), lanes.turn, slot.current():
        slot.inputs.there[:sent].copy_(slot.inputs.here[:sent], non_blocking=True)
        work.compute(_views(slot.inputs.there, inputs), _views(slot.outputs.there, outputs))
        slot.outputs.here[:returned].copy_(slot.outputs.there[:returned], non_blocking=True)
        if slot.landed is not None:
            slot.landed.record()


def _landed(span: Span, slot: Slot, work: Work) -> tuple[Span, Tensors, Tensors]:
    if slot.landed is not None:
        slot.landed.synchronize()
    inputs, outputs = work.parts(span)
    return span, _views(slot.inputs.here, inputs), _views(slot.outputs.here, outputs)


def _size(parts: Sequence[Part]) -> int:
    return sum(_padded(shape, dtype) for shape, dtype in parts)


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _views(buffer: torch.Tensor, parts: Sequence[Part]) -> Tensors:
    """The parts of a buffer of bytes, one behind the other, as tensors."""
    views, start = [], 0
    for shape, dtype in parts:
        end = start + math.prod(shape) * dtype.itemsize
        views.append(buffer[start:end].view(dtype).view(shape))
        start += _padded(shape, dtype)
    return tuple(views)


@contextmanager
def _told(device: torch.device) -> Iterator[None]:
    """Tells in one line that memory has run out; any other error of a GPU is a defect of a kernel."""
    try:
        yield
    except RuntimeError as error:
        line = _first_line(error)
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in line:
            raise
        raise BlockscaleError(
            "out of memory",
            where=f"device {device}",
            expected="room for a few strips for each worker",
            got=line,
            remedy="run again with fewer --workers or --device cpu: finished shards are kept",
        ) from error


def _unusable(what: str, got: str) -> BlockscaleError:
    return BlockscaleError(
        what, where="device cuda", expected="a GPU to run on", got=got, remedy="use --device cpu"
    )


def _first_line(error: BaseException) -> str:
    """The first sentence or two of what PyTorch says; advice for its developers follows."""
    return ". ".join(str(error).partition("\n")[0].split(". ")[:2])
