"""The command line, killed after a step of a training: `python -m tests.qat.dying 5 train ...`."""

import os
import signal
import sys

from blockscale.cli.main import main
from blockscale.qat.history import History, Step

add = History.add


def add_and_die(history, entry):
    add(history, entry)
    if isinstance(entry, Step) and entry.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    History.add = add_and_die
    main(sys.argv[2:])
