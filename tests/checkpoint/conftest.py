"""Checkpoints that several tests start from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockscale import Recipe, quantize_checkpoint, verify_checkpoint
from tests import data


@pytest.fixture
def pair(tmp_path):
    """A BF16 checkpoint and its ue8m0 result without the manifest, so that each check stands on its own."""
    source = data.write(tmp_path / "source", data.llama())
    quantize_checkpoint(source, tmp_path / "fp8", Recipe("ue8m0"))
    (tmp_path / "fp8" / "blockscale.json").unlink()
    assert verify_checkpoint(tmp_path / "fp8", source).problems == ()
    return tmp_path / "fp8", source


@pytest.fixture(scope="module")
def crash():
    """Sends requests to a process of its own that converts in forked children (crash.py)."""
    command = [sys.executable, str(Path(__file__).with_name("crash.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(
            src,
            dst,
            *,
            command="quantize",
            workers=1,
            overwrite=False,
            recipe=None,
            rounder=False,
            kill_at=None,
            records=None,
        ):
            request = {"command": command, "src": str(src), "dst": str(dst), "workers": workers}
            request |= {
                "overwrite": overwrite,
                "recipe": {"scale_fmt": "ue8m0"} if recipe is None else recipe,
            }
            request |= {"kill_at": kill_at, "kill_after_records": records, "rounder": rounder}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, "the crash process is gone"
            return json.loads(answer)

        yield ask
        process.stdin.close()
