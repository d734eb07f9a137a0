"""The command line in this process."""

from tests.cli.conftest import blockscale

__all__ = ["blockscale"]
