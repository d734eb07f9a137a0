"""What would keep a report from being written is said before any work is done."""

import os
import sys

import pytest

from blockscale.errors import BlockscaleError
from blockscale.report.page import write_page
from blockscale.report.ready import refuse_unready


def test_nothing_is_asked_where_no_report_is_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    refuse_unready(None)


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BlockscaleError, match=rf"--report: needs the package {package}; .*blockscale\[report\]"
    ):
        refuse_unready(tmp_path / "report.html")


def test_an_existing_report_is_replaced_and_none_is_left_behind(tmp_path):
    (tmp_path / "report.html").write_text("before")
    refuse_unready(tmp_path / "report.html")
    refuse_unready(tmp_path / "new.html")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "before")]


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "report.html", "no such folder"),
        (tmp_path / "file" / "report.html", "no such folder"),
    ):
        with pytest.raises(BlockscaleError, match=said):
            refuse_unready(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BlockscaleError, match="cannot be written: Permission denied"):
        refuse_unready(tmp_path / "report.html")


def test_a_folder_that_is_gone_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("blockscale.report.page.render", lambda page: "")
    with pytest.raises(BlockscaleError, match="cannot be written: No such file or directory"):
        write_page(None, tmp_path / "gone" / "report.html")
