"""Runs the command line in this process."""

import sys

import pytest

from blockscale.cli.main import main


@pytest.fixture
def blockscale(monkeypatch, capsys):
    """Call `main` with arguments; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["blockscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
