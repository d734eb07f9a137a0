"""Imports point one way: the contract in pyproject.toml holds, and it would notice if it did not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parent.parent
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def _lint_imports(root: Path) -> subprocess.CompletedProcess:
    # In a process of its own: the linter finds the package through the path, from the working directory on.
    command = [sys.executable, "-c", LINT_IMPORTS]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copy_of_the_package(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "blockscale", tmp_path / "blockscale", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_one_way():
    result = _lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("formats", "blockscale.checkpoint"),
        ("reference/fp8", "blockscale.ops"),
        ("checkpoint/__init__", "blockscale.cli.main"),
        ("checkpoint/__init__", "blockscale.model.config"),
        ("model/__init__", "blockscale.evaluate.compare"),
        ("qat/modules", "blockscale.search.run"),
        ("qat/modules", "blockscale.report.pages"),
        ("evaluate/__init__", "blockscale.qat.modules"),
        ("cli/main", "blockscale.testing"),
    ],
)
def test_an_import_against_the_order_is_noticed(copy_of_the_package, importer, imported):
    module = copy_of_the_package / "blockscale" / f"{importer}.py"
    module.write_text(f"{module.read_text()}\nimport {imported}\n")
    result = _lint_imports(copy_of_the_package)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 broken" in result.stdout


def test_a_module_without_a_layer_is_noticed(copy_of_the_package):
    (copy_of_the_package / "blockscale" / "stray.py").write_text("")
    result = _lint_imports(copy_of_the_package)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "stray" in result.stdout
