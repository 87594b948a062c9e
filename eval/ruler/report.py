"""What a report shows of section `ruler`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from eval.blocks import THIS, Block, Cell, Heading, Plot, Results, Run, Table, Text
from eval.plots import INK, SOFT, finish, line, new_figure, short_length
from eval.report_header import alone, beside, number
from eval.ruler.specs import CATEGORIES, TASKS

# Bad to good; legible with black and with white text, and without colour.
SHADES = LinearSegmentedColormap.from_list("scores", ["#c1582b", "#f2e8d8", "#1f5a7a"])


def ruler_glance(results: Results) -> list[tuple[str, str]]:
    """Return the mean at the shortest and the longest length, and the effective lengths."""
    section = results["ruler"]
    known = [row for row in section["means"] if row["mean"] is not None]
    count = _tasks(len(section["averaged"]))
    shown = [known[0], known[-1]] if len(known) > 1 else known
    rows = [
        (f"RULER, mean of {count} at {row['length']:,} tokens", f"{row['mean']:.1f}")
        for row in shown
    ]
    effective = section["effective"]["relative"]["length"]
    value = "none" if effective is None else f"{effective:,} tokens"
    return [*rows, ("RULER, effective length (relative)", value)]


def ruler_blocks(runs: Sequence[Run]) -> list[Block]:
    """Show scores by task and length, means, effective lengths, and needles by depth."""
    blocks: list[Block] = [Heading("RULER"), Text(_how(runs))]
    blocks.append(_means_table(runs))
    blocks.append(_effective_table(runs))
    if any(len(run.results["ruler"]["means"]) > 1 for run in runs):
        blocks.append(_means_plot(runs))
    for run in runs:
        if not alone(runs):
            blocks.append(Heading(f"RULER: {run.name}", level=3))
        blocks += _run_blocks(run)
    return blocks


def _tasks(count: int | str) -> str:
    return "1 task" if str(count) == "1" else f"{count} tasks"


def _how(runs: Sequence[Run]) -> str:
    section = runs[0].results["ruler"]
    options, texts = section["options"], section["texts"]
    made = "as NVIDIA's scripts make them" if options["compat"] else "of the project's generators"
    sources = ", ".join(f"{name} `{source}`" for name, source in texts.items())
    parts = [
        f"{options['samples']} samples a cell {made}, seed {options['seed']}, template "
        f"{options['template']}, greedy; {sources}.",
        "Length is that of prompt and answer together. A score is the share of the reference "
        "answers found in the output (for questions: whether one was), as in NVIDIA's RULER.",
    ]
    if any(run.results["ruler"]["options"] != options for run in runs):
        parts.append("**The runs have different settings**; those of the first are shown.")
    return " ".join(parts)


def _means(run: Run, length: int) -> dict[str, Any] | None:
    return next((row for row in run.results["ruler"]["means"] if row["length"] == length), None)


def _lengths(runs: Sequence[Run]) -> list[int]:
    return sorted({row["length"] for run in runs for row in run.results["ruler"]["means"]})


def _means_table(runs: Sequence[Run]) -> Table:
    """Means by length: of all tasks a column per run; in a report of one run its categories too."""
    averaged = {task for run in runs for task in run.results["ruler"]["averaged"]}
    used = {TASKS[task].category for task in averaged}
    names = [name for name in CATEGORIES if name in used]
    if not alone(runs) or len(names) < 2:
        names = []
    rows = []
    for length in _lengths(runs):
        found = [_means(run, length) for run in runs]
        row: list[str | Cell] = [f"{length:,}"]
        row += [_shaded(None if means is None else means["mean"]) for means in found]
        categories = found[0]["categories"] if names and found[0] else {}
        rows.append([*row, *(_shaded(categories.get(name)) for name in names)])
    counts = sorted({len(run.results["ruler"]["averaged"]) for run in runs})
    which = " or ".join(map(str, counts))
    caption = f"Mean of the {_tasks(which)} that ran at every length, percent."
    return Table(["length", *beside("mean", runs), *names], rows, caption)


def _effective_table(runs: Sequence[Run]) -> Table:
    def text(length: int | None) -> str:
        return "none" if length is None else f"{length:,}"

    sections = [run.results["ruler"] for run in runs]
    rows = [
        [
            "effective length, absolute: mean above 85.6",
            *(text(section["effective"]["absolute"]["length"]) for section in sections),
        ],
        [
            "effective length, relative: 0.9 of the mean at the shortest length",
            *(text(section["effective"]["relative"]["length"]) for section in sections),
        ],
    ]
    for name in ("increasing", "decreasing"):
        rows.append(
            [
                f"mean over lengths, weights {name} with length",
                *(number(section["weighted"][name], ".1f") for section in sections),
            ]
        )
    return Table(["", *beside("tokens or percent", runs)], rows)


def _means_plot(runs: Sequence[Run]) -> Plot:
    figure, (axes,) = new_figure()
    for i, run in enumerate(runs):
        rows = [row for row in run.results["ruler"]["means"] if row["mean"] is not None]
        line(axes, i, run.name, [row["length"] for row in rows], [row["mean"] for row in rows])
    axes.set_ylim(-2, 102)
    mark = {run.results["header"].get("training_length") for run in runs}
    finish(
        axes,
        "length in tokens",
        "mean score, percent",
        log_x=True,
        training_length=mark.pop() if len(mark) == 1 else None,
    )
    return Plot("ruler_means", figure, "Mean score of RULER against length.")


def _run_blocks(run: Run) -> list[Block]:
    section = run.results["ruler"]
    lengths = sorted(section["options"]["lengths"])
    cells = {(cell["task"], cell["length"]): cell for cell in section["cells"]}
    left_out = {(out["task"], out["length"]): out["reason"] for out in section["left_out"]}
    rows = []
    for task in section["options"]["tasks"]:
        row: list[str | Cell] = [task]
        for length in lengths:
            if (task, length) in left_out:
                row.append(Cell("not run", note=left_out[task, length]))
            else:
                row.append(_score_cell(cells[task, length]))
        rows.append(row)
    blocks: list[Block] = [
        Table(
            ["task", *(f"{length:,}" for length in lengths)],
            rows,
            "Score in percent with its 95 % Wilson interval.",
        ),
        _detail_table(section),
    ]
    if left_out:
        why = [[task, f"{length:,}", reason] for (task, length), reason in left_out.items()]
        blocks.append(Table(("task", "length", "why"), why, "Not run", prose=True))
    plot = _depth_plot(run, lengths)
    return [*blocks, plot] if plot else blocks


def _score_cell(cell: dict[str, Any]) -> Cell:
    low, high = cell["interval"]
    note = f"{cell['samples']} samples, {100 * cell['nulls']:.0f} % empty outputs"
    return Cell(f"{cell['score']:.1f} [{low:.0f}, {high:.0f}]", cell["score"] / 100, note)


def _shaded(value: float | None) -> Cell:
    return Cell(number(value, ".1f"), None if value is None else value / 100)


def _detail_table(section: dict[str, Any]) -> Table:
    rows = []
    for cell in section["cells"]:
        tokens, fill = cell["tokens"], cell["fill"]
        missed = cell.get("missed", [])
        shown = ", ".join(f"{depth:.2f}" for depth in missed[:12])
        if len(missed) > 12:
            shown += f", ... ({len(missed)} in all)"
        rows.append(
            [
                cell["task"],
                f"{cell['length']:,}",
                str(cell["samples"]),
                f"{100 * cell['nulls']:.1f} %",
                f"{tokens['min']:,} / {tokens['mean']:,.0f} / {tokens['max']:,}",
                f"{100 * fill['min']:.1f} / {100 * fill['mean']:.1f} / {100 * fill['max']:.1f} %",
                shown or "–",
            ]
        )
    columns = ("task", "length", "n", "empty", "prompt tokens", "fill", "depths of missed needles")
    caption = "Real lengths (min / mean / max), empty outputs, and where needles were missed"
    return Table(columns, rows, caption, detail=True)


def _depth_plot(run: Run, lengths: Sequence[int]) -> Plot | None:
    """Draw a heat map for each needle task: length across, depth down."""
    section = run.results["ruler"]
    tasks = [task for task in section["options"]["tasks"] if TASKS[task].needles is not None]
    cells = {(cell["task"], cell["length"]): cell for cell in section["cells"]}
    tasks = [task for task in tasks if any((task, length) in cells for length in lengths)]
    if not tasks:
        return None
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, panels = new_figure(7.2, 0.6 + 1.9 * rows, rows=rows, columns=columns)
    trained = run.results["header"].get("training_length")
    for axes, task in zip(panels, tasks, strict=False):
        _heat_map(axes, [cells.get((task, length)) for length in lengths])
        axes.set_title(task.removeprefix("niah_"), fontsize=8.5, color=INK, loc="left")
        axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        if trained is not None:
            within = sum(length <= trained for length in lengths)
            if 0 < within < len(lengths):
                axes.axvline(within - 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    caption = (
        "Needles found by length (across) and depth (down: 0 is the beginning of the context); "
        "percent, by parts of the depth. A dashed line separates lengths within the training "
        "length from longer ones."
    )
    name = "ruler_depth" if run.name == THIS else f"ruler_depth_{_file_name(run.name)}"
    return Plot(name, figure, caption)


def _heat_map(axes: Any, cells: Sequence[dict[str, Any] | None]) -> None:
    bins = next(cell["depths"] for cell in cells if cell is not None)
    values = np.full((len(bins), len(cells)), np.nan)
    for x, cell in enumerate(cells):
        for y, part in enumerate(cell["depths"] if cell is not None else ()):
            if part["score"] is not None:
                values[y, x] = part["score"]
    axes.grid(visible=False)
    axes.imshow(values, cmap=SHADES, vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < 25 or value > 75 else INK
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
    edges = [part["from"] for part in bins] + [1.0]
    axes.set_yticks(np.arange(len(edges)) - 0.5, [f"{edge:g}" for edge in edges])
    axes.tick_params(labelsize=7, colors=SOFT)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
