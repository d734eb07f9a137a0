"""One of the processes that test_ranks.py starts in torchrun's environment: its task and an argument."""

import json
import os
import signal
import sys
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist

from blockscale.checkpoint.precision import parse_precision
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.metrics import kl_divergence
from blockscale.model import watch
from blockscale.model.attention import Batch
from blockscale.model.config import from_huggingface
from blockscale.model.generate import generate
from blockscale.model.launch import open_ranks
from blockscale.model.load import load_model
from blockscale.model.prefill import prefill
from blockscale.reference.attention import Spans
from blockscale.testing.random_model import random_model

# What two GPUs are compared with one in: options of random_model.
FORMATS = {
    "bf16": {},
    "float32": {"fmt": BlockFP8()},
    "ue8m0": {"fmt": BlockFP8(scale_fmt="ue8m0")},
    "int4": {"fmt": BlockFP8(), "experts": GroupInt(4, 128)},
    "mxfp4": {"fmt": BlockFP8(), "experts": MXFP4()},
}


def prompts(vocabulary=320):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (30, 5, 17)]


def computed(model):
    """Logits after the prompts, and what the model writes."""
    some = prompts()
    return {
        "logits": prefill(model, model.cache(len(some), 64), some),
        "tokens": generate(model, some, max_new_tokens=6, stop=()),
    }


def load(device, folder, dtype=torch.float32, **options):
    precision = parse_precision(options.pop("precision", ()))
    return load_model(folder, device=device, dtype=dtype, precision=precision, **options)


def work(path):
    """Do the jobs of a file on all ranks or on one of two teams; what each has computed, or its error."""
    with open(path) as file:
        jobs = json.load(file)
    with open_ranks("cpu") as ranks:
        half, results = ranks.world // 2, {}
        team, number = _team(ranks, half), ranks.rank // half
        of_teams = [name for name, job in jobs.items() if job["world"] == half]
        done = {
            name: _result(team, jobs[name]) for name in of_teams[number::2]
        }  # the other team has the rest
        for name, result in chain(*(each.items() for each in ranks.gather(done))):
            results.setdefault(name, []).append(result)
        for name in [name for name in jobs if name not in results]:
            results[name] = ranks.gather(_result(ranks, jobs[name]))
        if ranks.rank == 0:
            torch.save(results, f"{path}.results")


def _team(ranks, size):
    """Every `size` ranks as a run of their own: the one that this rank is in."""
    for first in range(0, ranks.world, size):
        members = list(range(first, first + size))
        groups = [dist.new_group(members, backend="gloo") for _ in range(2)]
        if ranks.rank in members:
            own = replace(ranks, rank=ranks.rank - first, world=size, group=groups[0], objects=groups[1])
    return own


def _result(ranks, job):
    try:
        return computed(load(ranks, job["folders"][ranks.rank], **job["options"]))
    except BlockscaleError as error:
        return str(error)


def die(how):
    """Rank 1 is killed while it computes with the others, or while they wait for rank 0."""
    with open_ranks("cpu") as ranks:
        x = torch.ones(1)
        for step in range(1 << 30):
            if ranks.rank == 1 and step == 100:
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "waiting" and step == 100:
                ranks.broadcast(sys.stdin.read() if ranks.rank == 0 else None)
            ranks.all_reduce(x)


def fail(_):
    """Rank 1 raises what the others do not."""
    watch._GRACE = 0.5  # seconds that nobody else fails
    with open_ranks("cpu") as ranks:
        if ranks.rank == 1:
            raise BlockscaleError("is alone")
        ranks.all_reduce(torch.ones(1))


def compare(path):
    """On two GPUs: what two ranks write, and how close its logits are to those of one."""
    with open(path) as file:
        configs = json.load(file)
    results = {}
    with open_ranks("cuda") as ranks:
        for name, config in configs.items():
            for kind, formats in FORMATS.items():
                shape, some = from_huggingface(config), prompts(config["vocab_size"])
                model = random_model(shape, ranks.device, **formats, ranks=ranks)
                written = generate(model, some, max_new_tokens=24, stop=())
                logits, everywhere = _after(model, some, written), ranks.gather(written)
                if ranks.rank == 0:
                    one = random_model(shape, ranks.device, **formats)
                    result = _differences(one, some, written, logits)
                    result["same on both"] = everywhere == [written] * 2
                    results[f"{name} {kind}"] = result
                ranks.wait()
        if ranks.rank == 0:
            with open(f"{path}.results", "w") as file:
                json.dump(results, file)


def _differences(model, some, written, logits):
    """Between a model and others that have written, with these logits after each token."""
    alone, expected = generate(model, some, max_new_tokens=24, stop=()), _after(model, some, written)
    chosen, own = (torch.tensor([*chain(*each)], device=model.device) for each in (written, alone))
    of_chosen = expected.gather(1, chosen[:, None])[:, 0]
    return {
        "tokens that are the same": int((chosen == own).sum()),
        "divergence": float(kl_divergence(expected, logits).mean()),
        "less likely by": float((expected.max(-1).values - of_chosen).mean()),
    }


def _after(model, some, written):
    """Logits of every token that was written, by a call that reads all at once."""
    logits = []
    for prompt, new in zip(some, written, strict=True):
        ids = torch.tensor(prompt + new, device=model.device)
        places = torch.arange(len(ids), device=model.device)
        batch = Batch(ids, places, torch.zeros_like(ids), Spans(((0, 0, len(ids)),), ids.device), len(ids))
        logits.append(model.logits(model(batch, model.cache(1, len(ids))))[len(prompt) - 1 : -1])
    return torch.cat(logits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {each.__name__: each for each in (work, die, fail, compare)}
    try:
        kinds[sys.argv[1]](sys.argv[2])
    except BlockscaleError as error:
        sys.exit(str(error))
