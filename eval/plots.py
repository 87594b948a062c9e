"""How the plots of a report look."""

import io
import re
from collections.abc import Sequence
from functools import lru_cache

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinct in colour and, with MARKERS, without colour.
COLOURS = ("#1f5a7a", "#c1582b", "#4f7f3f", "#7b4f93", "#9a7b1e", "#5b6470", "#b0446a", "#2f8c86")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, SOFT = "#1c1e21", "#62676d"


def new_figure(
    width: float = 7.2, height: float = 3.6, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Make a figure of `rows` x `columns` panels, returned row by row; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.patch.set_alpha(0.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.tick_params(colors=SOFT, labelsize=8.5)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def line(
    axes: Axes,
    index: int,
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> None:
    """Draw the curve of run `index`, with a band between `low` and `high` where they are given."""
    colour = COLOURS[index % len(COLOURS)]
    marker = MARKERS[index % len(MARKERS)]
    (drawn,) = axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.5)
    # Set, not passed: matplotlib hides legend labels that begin with an underscore.
    drawn.set_label(label.lstrip("_"))
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def finish(
    axes: Axes,
    x: str,
    y: str,
    *,
    log_x: bool = False,
    title: str = "",
    training_length: int | None = None,
    legend: bool = True,
) -> None:
    """Label the axes, mark the training length, and show which curve is which.

    Args:
        axes: with all curves drawn.
        x, y: labels.
        log_x: powers of two on the x axis; lengths are written as 1K, 2K, ...
        title: of a panel.
        training_length: position of a vertical line, on the axis of x.
        legend: only shown where there is more than one curve.
    """
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    if title:
        axes.set_title(title, fontsize=9.5, color=INK, loc="left", parse_math=False)
    if log_x and any(len(drawn.get_xdata()) for drawn in axes.lines):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: short_length(value))
    if training_length is not None:
        axes.axvline(training_length, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "training length",
            (training_length, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            fontsize=7.5,
            color=SOFT,
            va="top",
        )
    handles, labels = axes.get_legend_handles_labels()
    if legend and len(handles) > 1:
        shown = axes.legend(handles, labels, fontsize=8, frameon=False)
        for text in shown.get_texts():
            text.set_parse_math(False)


def short_length(value: float) -> str:
    """Write 512 as 512, 2048 as 2K, 1048576 as 1M."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if value >= size and value % size == 0:
            return f"{value // size:g}{unit}"
    return f"{value:g}"


@lru_cache(maxsize=64)  # HTML and file show the same figure
def to_svg(figure: Figure) -> str:
    """Write a figure as one <svg> element, the same text each time."""
    buffer = io.StringIO()
    # Text stays text, in the reader's own font; identifiers follow from the content alone.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ssm_hf"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
