"""The package as it is installed: version, command, type marker, and no import that it does without."""

import subprocess
import sys
from importlib import metadata, resources

import blockscale
from blockscale.version import __version__


def _run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_the_installed_version_is_that_of_the_code():
    assert metadata.version("blockscale") == __version__


def test_the_command_is_the_main_function():
    (command,) = [e for e in metadata.distribution("blockscale").entry_points if e.group == "console_scripts"]
    assert (command.name, command.value) == ("blockscale", "blockscale.cli.main:main")
    assert callable(command.load())


def test_the_package_says_that_it_is_typed():
    assert resources.files("blockscale").joinpath("py.typed").is_file()


def test_every_public_name_exists_and_is_documented():
    assert blockscale.__all__
    for name in blockscale.__all__:
        value = getattr(blockscale, name)
        assert not callable(value) or value.__doc__, name


def test_optional_packages_are_not_imported_with_the_package():
    optional = {"transformers", "ray", "compressed_tensors", "lm_eval", "plotly", "gguf", "accelerate"}
    result = _run("-c", "import sys, blockscale, blockscale.cli.main; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    assert not optional & set(result.stdout.split())


def test_help_lists_the_subcommands():
    result = _run("-m", "blockscale", "--help")
    assert result.returncode == 0, result.stderr
    for command in ("quantize", "dequantize", "inspect", "plan", "verify"):
        assert command in result.stdout
