"""A page is one file: complete without scripts, nothing to fetch, and names are text whatever they are."""

import base64
import hashlib

from blockscale.report import figures
from blockscale.report.content import Chart, Code, Facts, Note, Page, Section, Table, View
from blockscale.report.page import render, write_page
from tests.report.parsed import Parsed

HOSTILE = "</script><script>fail()</script><img src=x onerror=fail()>\"'&amp;{{ 7 * 7 }}"


def page(name):
    chart = Chart(
        name, name, (View(name, figures.ranking([name], [1.0], [name], name)), View("b", _bars(name)))
    )
    parts = (
        Facts(((name, name, name),)),
        chart,
        Table(name, (name,), ((name,),)),
        Note(name),
        Code(name, name),
    )
    return Page(name, Facts(((name, name, name),)), (Section(name, parts),), "1.0")


def _bars(name):
    return figures.bars([[name], [name]], {name: [1.0]}, {name: [name]})


def test_names_are_text_whatever_they_are():
    plain, hostile = Parsed(render(page("name"))), Parsed(render(page(HOSTILE)))
    assert hostile.tags == plain.tags
    assert [(tag, key) for tag, key, _ in hostile.attributes] == [
        (tag, key) for tag, key, _ in plain.attributes
    ]
    assert len(hostile.scripts) == 2
    assert hostile.headings == [HOSTILE, HOSTILE]
    assert hostile.tables == [[[HOSTILE], [HOSTILE]]]
    assert hostile.code == [HOSTILE]


def test_tags_in_names_are_no_tags_in_figures():
    ranking, bars = Parsed(render(page('<a href="javascript:fail()">x</a>'))).figures
    shown = [
        *ranking["layout"]["yaxis"]["ticktext"],
        *ranking["data"][0]["customdata"],
        *bars["data"][0]["y"][0],
    ]
    assert len(shown) == 3
    assert all(text.startswith("&lt;a ") and "<" not in text for text in shown)


def test_nothing_is_fetched_and_only_its_own_scripts_may_run():
    found = Parsed(render(page("name")))
    links = [value for _, key, value in found.attributes if key in ("src", "href")]
    assert links == ["#name"]
    (policy,) = [
        value for tag, key, value in found.attributes if tag == "meta" and value.startswith("default-src")
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    sums = {base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found.scripts}
    assert set(rules["script-src"].split()) == {f"'sha256-{each}'" for each in sums}


def test_phones_and_readers_without_scripts_are_thought_of():
    source = render(page("name"))
    found = Parsed(source)
    assert ("meta", "content", "width=device-width, initial-scale=1") in found.attributes
    assert "noscript" in found.tags
    assert "prefers-color-scheme: dark" in source


def test_plotly_is_there_once_and_only_with_a_chart():
    assert render(page("name")).count("plotly.js v") == 1
    plain = Page("title", Facts(()), (Section("s", (Note("text"),)),), "1.0")
    found = Parsed(render(plain))
    assert found.scripts == []
    assert len(render(plain)) < 20_000


def test_folded_tables_say_how_long_they_are():
    table = Table("all", ("n",), tuple((str(n),) for n in range(7)), folded=True)
    source = render(Page("title", Facts(()), (Section("s", (table,)),), "1.0"))
    assert "<summary>all (7 rows)</summary>" in source
    assert len(Parsed(source).table("n")) == 7


def test_a_name_that_is_no_unicode_can_be_written(tmp_path):
    write_page(page("name\udcff"), tmp_path / "report.html")
    assert r"name\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 1


def test_no_figure_ends_the_element_it_stands_in():
    figure = {"data": [{"type": "bar", "text": HOSTILE}], "layout": {"height": 1}}
    chart = Chart("title", "note", (View("all", figure),))
    found = Parsed(render(Page("title", Facts(()), (Section("s", (chart,)),), "1.0")))
    assert found.figures == [figure]
    assert len(found.scripts) == 2
