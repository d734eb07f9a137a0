"""Pages in a real browser: charts are drawn, nothing fails or is fetched, and a phone never scrolls aside."""

import pytest

from blockscale.report.page import write_page
from blockscale.report.pages import diagnose_page, evaluate_page, quantize_page, search_page
from tests.report import browser, examples
from tests.report.test_page import HOSTILE, page

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here")
PHONE = 390
MARKS = ".barlayer path, .scatterlayer path, .heatmaplayer image"
DRAWN = f"[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('{MARKS}').length)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.open_tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def written(converted, diagnosis, tmp_path_factory):
    """A report of every kind, and one with hostile names; file by name."""
    model, source = converted.destination, converted.source
    pages = {
        "quantize": quantize_page(converted),
        "evaluate": evaluate_page(examples.evaluation(model, source), examples.WINDOWS),
        "diagnose": diagnose_page(diagnosis, model, source),
        "search": search_page(examples.search_result()),
        "hostile": page(HOSTILE),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, each in pages.items():
        write_page(each, folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("name", ["quantize", "evaluate", "diagnose", "search", "hostile"])
def test_every_chart_is_drawn_on_a_phone_in_either_colours(tab, written, tmp_path, name):
    tab.load(written / f"{name}.html", width=PHONE, height=844)
    for dark in (False, True):
        tab.prefer(dark)
        tab.settle()
        assert tab.errors == []
        drawn = tab.evaluate(DRAWN)
        assert drawn
        assert all(drawn)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE
        colour = tab.evaluate("getComputedStyle(document.querySelector('.plot text')).fill")
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (brightness(colour) > 128) == dark
        assert (brightness(paper) > 128) != dark
        tab.screenshot(tmp_path / "shot.png")
        assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")
    assert [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def brightness(colour):
    """Of `rgb(r, g, b)`, 0 to 255."""
    return sum(float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]) / 3


def test_another_view_of_a_chart_can_be_chosen(tab, written):
    tab.load(written / "diagnose.html")
    unit = "document.querySelector('.plot').data[0].colorbar.title.text"
    assert tab.evaluate(unit) == "nats"
    chosen = "document.querySelector('select').selectedIndex = 2"
    tab.evaluate(f"{chosen}; document.querySelector('select').dispatchEvent(new Event('change'))")
    assert tab.evaluate(unit) == "dB"
    assert tab.errors == []


def test_costs_of_another_format_can_be_chosen(tab, written):
    tab.load(written / "search.html", width=PHONE, height=844)
    longest = "Math.max(...document.querySelectorAll('.plot')[1].data[0].x)"
    assert tab.evaluate(longest) == 0.04
    chosen = "document.querySelector('select').selectedIndex = 1"
    tab.evaluate(f"{chosen}; document.querySelector('select').dispatchEvent(new Event('change'))")
    assert tab.evaluate(longest) == 0.05
    assert tab.errors == []


def test_without_scripts_tables_are_there_and_empty_charts_are_not(tab, written):
    tab.load(written / "diagnose.html", width=PHONE, scripts=False)
    assert tab.evaluate("[...document.querySelectorAll('.chart')].every(each => !each.offsetHeight)")
    assert tab.evaluate("document.querySelectorAll('td').length") > 100
    assert "Charts need scripts" in tab.evaluate("document.body.innerText")
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_hostile_names_run_nothing(tab, written):
    tab.load(written / "hostile.html")
    assert tab.errors == []
    assert tab.evaluate("document.querySelector('h1').textContent") == HOSTILE
    assert tab.evaluate("document.images.length") == 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("missing()", "missing is not defined"),
        ("console.error('told')", "told"),
        ("setTimeout(() => { throw new Error('late') }, 0)", "late"),
        ("Promise.reject(new Error('refused'))", "refused"),
    ],
)
def test_an_error_on_a_page_is_noticed(tab, tmp_path, script, said):
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html><title>bad</title><script>{script}</script>")
    tab.load(tmp_path / "bad.html")
    assert any(said in error for error in tab.errors)


def test_the_policy_stops_foreign_scripts_and_requests(tab, written, tmp_path):
    source = (written / "search.html").read_text(encoding="utf-8")
    bad = "<script>document.title = 'ran'</script><img src='http://127.0.0.1:9/x.png'>"
    (tmp_path / "bad.html").write_text(source.replace("<main>", f"<main>{bad}"), encoding="utf-8")
    tab.load(tmp_path / "bad.html")
    assert tab.evaluate("document.title") != "ran"
    assert sum("Content Security Policy" in error for error in tab.errors) == 2


def test_a_chart_that_is_not_drawn_and_a_page_too_wide_are_noticed(tab, written, tmp_path):
    source = (written / "search.html").read_text(encoding="utf-8")
    wide = "<div class='plot' style='width: 500px'>x</div>"
    (tmp_path / "bad.html").write_text(source.replace("<main>", f"<main>{wide}"), encoding="utf-8")
    tab.load(tmp_path / "bad.html", width=PHONE, height=844)
    assert not all(tab.evaluate(DRAWN))
    assert tab.evaluate("document.documentElement.scrollWidth") > PHONE
