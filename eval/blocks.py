"""What a report is made of, and how it becomes Markdown, HTML and text for a terminal.

A section of a report is a list of blocks: `Heading`, `Text`, `Table`, `Plot`, `Verbatim`. The text
of all of them may hold `code`, **bold** and [links](to), as in Markdown.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from eval.plots import to_svg

Results = dict[str, Any]


THIS = "this model"


class Run(NamedTuple):
    """One run of `eval.run`: its name in the report, and what is in its results.json.

    A report of one run calls it `THIS`; one of several names them all, also where a section has
    only one of them.
    """

    name: str
    results: Results


class Heading(NamedTuple):
    """level 2 begins a section, 3 a part of one."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Cell(NamedTuple):
    """One cell of a table.

    Args:
        text: as shown.
        shade: 0 (bad) .. 1 (good) tints the cell in HTML, None does not.
        note: shown when the reader points at the cell (n, interval, ...), in HTML only.
    """

    text: str
    shade: float | None = None
    note: str = ""


class Table(NamedTuple):
    """Rows of text under columns; the first column is aligned to the left.

    Args:
        columns: names.
        rows: cells, plain text or `Cell`.
        caption: a sentence that says what is in the table, with n and what the intervals are.
        detail: kept out of sight: folded in HTML, left out on a terminal.
        prose: cells hold words: aligned to the left, and broken into lines in HTML.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    detail: bool = False
    prose: bool = False


class Plot(NamedTuple):
    """A figure.

    Args:
        name: of its file, without ending; unique within a report.
        figure: what eval/plots.py helps to draw.
        caption: what is to be seen in it.
    """

    name: str
    figure: Figure
    caption: str


class Verbatim(NamedTuple):
    """Text of a model, shown as it is."""

    text: str


Block = Heading | Text | Table | Plot | Verbatim


def _text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


# --- Markdown ---------------------------------------------------------------------------------


def to_markdown(blocks: Sequence[Block], plots: str) -> str:
    """Write blocks as Markdown; plots are links to `<plots>/<name>.svg`."""
    return "\n\n".join(_markdown(block, plots) for block in blocks) + "\n"


def _markdown(block: Block, plots: str) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + block.text
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Plot):
        return f"![{block.caption}]({plots}/{block.name}.svg)\n\n*{block.caption}*"
    if isinstance(block, Verbatim):
        # A fence longer than any run of backticks in the text cannot be closed by it.
        runs = [len(run) for run in re.findall("`+", block.text)]
        fence = "`" * (max([2, *runs]) + 1)
        return f"{fence}text\n{block.text}\n{fence}"
    table = markdown_table(block.columns, block.rows)
    return f"{table}\n\n*{block.caption}*" if block.caption else table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Write one table as Markdown."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


# --- terminal ---------------------------------------------------------------------------------


def to_text(blocks: Sequence[Block]) -> str:
    """Write headings, tables and verbatim text for a terminal."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(block.text)
        elif isinstance(block, Table) and not block.detail:
            parts.append(text_table(block.columns, block.rows, prose=block.prose))
        elif isinstance(block, Verbatim):
            # Control characters of an untrained model would garble the terminal.
            clean = "".join(
                c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
                for c in block.text
            )
            parts.append("\n".join("  | " + line for line in clean.split("\n")))
    return "\n\n".join(parts)


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, prose: bool = False
) -> str:
    """Align the first column to the left and the others to the right, `prose` all to the left."""
    table = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        align = str.ljust if prose else str.rjust
        cells += [align(cell, width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return ("  " + "  ".join(cells)).rstrip()

    rule = "  " + "  ".join("-" * width for width in widths)
    head = [line(table[0]), rule] if any(columns) else []
    return "\n".join([*head, *map(line, table[1:])])


# --- HTML -------------------------------------------------------------------------------------


def to_html(title: str, blocks: Sequence[Block], footer: str) -> str:
    """Write one page that needs nothing but itself.

    Args:
        title: of the page.
        blocks: its content; headings of level 2 make the list of contents.
        footer: last line, where a report says how it was made.
    """
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(name)}">{_inline(name)}</a>' for name in sections)
    body = "\n".join(_html(block) for block in blocks)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<nav>{links}</nav>\n{body}\n<footer>{_inline(footer)}</footer>\n</body></html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        identity = f' id="{_anchor(block.text)}"' if block.level == 2 else ""
        return f"<h{block.level}{identity}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Verbatim):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Plot):
        label = html.escape(block.caption, quote=True)
        svg = to_svg(block.figure).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        return f"<figure>{svg}<figcaption>{_inline(block.caption)}</figcaption></figure>"
    head = "".join(f"<th>{_inline(column)}</th>" for column in block.columns)
    head = f"<thead><tr>{head}</tr></thead>" if any(block.columns) else ""
    facts = ' class="facts"' if block.prose else ""
    rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in block.rows)
    table = f'<div class="scroll"><table{facts}>{head}<tbody>\n{rows}\n</tbody></table></div>'
    caption = f'<div class="caption">{_inline(block.caption)}</div>' if block.caption else ""
    if not block.detail:
        return table + caption
    return f"<details><summary>{_inline(block.caption or 'Details')}</summary>{table}</details>"


def _html_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{_inline(cell)}</td>"
    style = "" if cell.shade is None else f' style="background:{_tint(cell.shade)}"'
    note = f' title="{html.escape(cell.note, quote=True)}"' if cell.note else ""
    return f"<td{style}{note}>{_inline(cell.text)}</td>"


def _tint(shade: float) -> str:
    """From a warm to a cool tint; dark ink can be read on all of them."""
    low, high = (246, 222, 205), (198, 224, 233)
    shade = min(max(shade, 0.0), 1.0)
    red, green, blue = (round(a + (b - a) * shade) for a, b in zip(low, high, strict=True))
    return f"rgb({red},{green},{blue})"


def _anchor(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _inline(text: str) -> str:
    """Escape text and turn `code`, **bold** and [links](to) into elements."""
    parts = re.split(r"(`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{html.escape(part[1:-1])}</code>"
            continue
        part = html.escape(part)
        part = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)
        parts[i] = re.sub(r"\[([^\]]+)\]\(((?:https?:|#)[^)\s]*)\)", r'<a href="\2">\1</a>', part)
    return "".join(parts)


def write_plots(blocks: Sequence[Block], directory: Path) -> list[Path]:
    """Write the plots of a report as SVG files; returns them."""
    files = []
    for block in blocks:
        if isinstance(block, Plot):
            directory.mkdir(parents=True, exist_ok=True)
            files.append(directory / f"{block.name}.svg")
            files[-1].write_text(to_svg(block.figure), encoding="utf-8")
    return files
