"""Blocks of a report in Markdown, HTML and for a terminal."""

import json
import re
from html.parser import HTMLParser

import pytest

from eval.blocks import (
    Cell,
    Heading,
    Plot,
    Table,
    Text,
    Verbatim,
    to_html,
    to_markdown,
    to_text,
)
from eval.plots import finish, line, new_figure, short_length, to_svg
from eval.report import read_runs, run_names


class _Balanced(HTMLParser):
    """Fails on a tag that is closed but not open; `open` is empty at the end of a whole page."""

    VOID = ("meta", "br", "path", "use", "image", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def _plot(name: str = "curve") -> Plot:
    figure, (axes,) = new_figure()
    line(axes, 0, "_a $b$", [1024, 2048], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5])
    line(axes, 1, "b", [1024, 2048], [2.0, 1.0])
    finish(axes, "x", "y", log_x=True, title="t", training_length=1024)
    return Plot(name, figure, "A <curve> with `code`.")


BLOCKS = [
    Heading("First & foremost"),
    Text("Some `a < b` and **bold** and [a link](https://example.org/x)."),
    Table(("name", "value"), [("a|b", Cell("0.5", 0.5, 'n "10"')), ("<c>", "1")], "A caption."),
    Table(("secret", "x"), [("k", "v")], "Hidden", detail=True),
    _plot(),
    Heading("Part", 3),
    Verbatim("x ``` <y>\n\x07z"),
]


def test_markdown() -> None:
    text = to_markdown(BLOCKS, "plots")
    for expected in (
        "## First & foremost",
        "| name | value |\n| --- | ---: |\n| a\\|b | 0.5 |\n| <c> | 1 |\n\n*A caption.*",
        "](plots/curve.svg)",
        "### Part",
        "````text\nx ``` <y>\n\x07z\n````",
    ):
        assert expected in text


def test_html_is_whole_escaped_and_alone() -> None:
    page = to_html("A <title>", BLOCKS, "Made by `x`.")
    parser = _Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    for expected in (
        "<title>A &lt;title&gt;</title>",
        '<a href="#first-foremost">First &amp; foremost</a>',
        "<code>a &lt; b</code> and <strong>bold</strong>",
        '<a href="https://example.org/x">a link</a>',
        '<td style="background:rgb(222,223,219)" title="n &quot;10&quot;">0.5</td>',
        "<details><summary>Hidden</summary>",
        'aria-label="A &lt;curve&gt; with `code`."',
        "<pre>x ``` &lt;y&gt;",
    ):
        assert expected in page
    # Nothing is loaded from anywhere.
    assert not re.search(r"<(script|link|img)|url\((?!#)|@import", page)


def test_terminal() -> None:
    text = to_text(BLOCKS)
    assert "First & foremost" in text
    assert "  name  value\n  ----  -----\n  a|b     0.5\n  <c>       1" in text
    assert "secret" not in text
    assert "  | \N{REPLACEMENT CHARACTER}z" in text


def test_plots_are_the_same_each_time() -> None:
    assert to_svg(_plot().figure) == to_svg(_plot().figure)
    assert "training length" in to_svg(_plot().figure)
    assert [short_length(n) for n in (100, 2048, 2**20, 3000)] == ["100", "2K", "1M", "3000"]


def test_runs_are_named_by_what_tells_them_apart(tmp_path) -> None:
    assert run_names(["runs/a/final", "runs/b/final"]) == ["a", "b"]
    assert run_names(["org/one", "/x/y/two", "a/b/c"]) == ["org/one", "two", "c"]
    assert run_names(["a/final", "a/final"]) == ["1: a/final", "2: a/final"]
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        read_runs([tmp_path / "none.json"])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a results\.json"):
        read_runs([tmp_path / "bad.json"])
    old = {"header": {"model": {"name": "m"}, "command": "python -m eval.run --model m"}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"format None, expected 1: .* python -m eval\.run"):
        read_runs([tmp_path / "old.json"])
