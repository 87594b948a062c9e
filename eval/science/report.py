"""What a science suite's results show: the blocks of its report, and its files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.blocks import (
    Block,
    Cell,
    Heading,
    Plot,
    Table,
    Text,
    to_html,
    to_markdown,
    write_plots,
)
from eval.plots import finish, line, new_figure

Values = dict[str, Any]

SHADES = {"confirmed": 1.0, "not confirmed": 0.0, "not decided": 0.5, "not tested": None}


def write_report(results: Values, directory: Path) -> list[Path]:
    """Write science.json, report.html, report.md and the plots; returns the files."""
    files = render(results, directory)
    data = directory / "science.json"
    data.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [data, *files]


def render(results: Values, directory: Path) -> list[Path]:
    """Write report.html, report.md and the plots from the values of a science.json."""
    directory.mkdir(parents=True, exist_ok=True)
    blocks, title = report_blocks(results), results["header"]["title"]
    page, report = directory / "report.html", directory / "report.md"
    made = "Made by `python -m eval.science` from science.json alone."
    page.write_text(to_html(title, blocks, made), encoding="utf-8")
    report.write_text(to_markdown([Heading(title, 1), *blocks], "plots"), encoding="utf-8")
    return [page, report, *write_plots(blocks, directory / "plots")]


def report_blocks(results: Values) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [Table(("", ""), header_rows(results["header"]), prose=True)]
    blocks += [
        Heading("Claims"),
        Table(
            ("claim", "expected", "found", "verdict"),
            [_claim_row(claim) for claim in results["claims"]],
            "Numbers are means over seeds at the model's best learning rate, each seed in "
            "brackets. An effect counts beyond the smallest that these seeds and test samples "
            "could have shown (95 %: Student's t over seeds, Wilson over samples); within it "
            "nothing is decided.",
            prose=True,
        ),
    ]
    if results["controls"]:
        rows = [_control_row(row) for row in results["controls"]]
        columns = ("control", "expected", "runs as expected", "verdict")
        blocks += [Heading("Controls"), Table(columns, rows, prose=True)]
    blocks.append(Heading("Experiments"))
    for name, experiment in results["experiments"].items():
        blocks += _experiment_blocks(name, experiment)
    for title, rows in (
        ("Failed runs", [(f["run"], f["error"].splitlines()[0]) for f in results["failures"]]),
        ("Runs that read or forget what they must not", _flagged_rows(results)),
        ("Not run", [(run, "") for run in results["unfinished"]]),
    ):
        if rows:
            blocks += [Heading(title), Table(("run", ""), rows, prose=True)]
    return blocks


def header_rows(header: Values) -> list[tuple[str, str]]:
    """What the numbers depend on, as (name, value)."""
    runs = header["runs"]
    rows = [
        ("suite", f"`{header['suite']}`, sha256 {header['suite_sha256'][:16]}"),
        ("device", header["device"]),
        (
            "runs",
            f"{runs['finished']} finished, {runs['failed']} failed, {runs['planned']} planned; "
            f"{header['workers']} at once",
        ),
        (
            "time",
            f"{header['minutes']:.1f} minutes in this call, {header['run_minutes']:.1f} in all "
            "finished runs together",
        ),
        ("date", header["date"]),
        ("versions", ", ".join(f"{name} {of}" for name, of in header["versions"].items())),
    ]
    return rows + ([("budget", header["budget"])] if header["budget"] else [])


# --- claims and controls --------------------------------------------------------------------------


def _claim_row(claim: Values) -> tuple[str | Cell, ...]:
    found = [check_text(check) for check in claim["checks"]] or [claim["why_not"]]
    text = f"{claim['claim']} ({claim['source']})"
    return text, claim["shape"], "; ".join(found), _verdict(claim["verdict"])


def check_text(check: Values) -> str:
    """One comparison: numbers, effect, and the smallest that could have been seen."""
    if check["effect"] is None:
        return check["text"]
    seen = "one seed has no resolution"
    if check["resolution"] is not None:
        seen = f"effect {check['effect']:+.3f}, smallest to be seen {check['resolution']:.3f}"
    return f"{check['text']}: {seen}, {check['verdict']}"


def _control_row(row: Values) -> tuple[str | Cell, ...]:
    count = f"{row['as_expected']} of {row['runs']}"
    return row["control"], row["expected"], count, _verdict(row["verdict"])


def _verdict(verdict: str) -> Cell:
    return Cell(f"**{verdict}**", SHADES[verdict])


def _flagged_rows(results: Values) -> list[tuple[str, str]]:
    rows = []
    for row in results["flagged"]:
        says = []
        if row["leaks"]:
            worst = max(row["follows_labels"], row["sees_ahead"])
            says.append(f"reads what it must not: {worst:.0%} of its answers change")
        if row["wiped"]:
            says.append(f"nothing older than {row['reach']} tokens reaches its outputs")
        rows.append((row["run"], "; ".join(says)))
    return rows


def summary(results: Values) -> str:
    """The verdicts, for a terminal."""
    lines = []
    for row in results["claims"]:
        lines.append(f"{row['verdict'].upper():14} {row['claim']} ({row['source']})")
        lines.append(f"{'':14}   expected: {row['shape']}")
        lines += [f"{'':14}   {check_text(check)}" for check in row["checks"]]
        if row["why_not"]:
            lines.append(f"{'':14}   {row['why_not']}")
    for row in results["controls"]:
        count = f"{row['as_expected']} of {row['runs']} runs"
        verdict = row["verdict"].upper()
        lines.append(f"{verdict:14} control: {row['control']}: {row['expected']}, {count}")
    runs = results["header"]["runs"]
    counts = (
        f"{runs['finished']} runs finished",
        f"{runs['failed']} failed",
        f"{runs['planned']} planned",
    )
    lines.append(", ".join(counts))
    lines += [f"failed: {f['run']}: {f['error'].splitlines()[0]:.160}" for f in results["failures"]]
    return "\n".join(lines)


# --- experiments ----------------------------------------------------------------------------------


def _experiment_blocks(name: str, experiment: Values) -> list[Block]:
    metric, over = experiment["metric"], experiment["vary"] or "length"
    options = ", ".join(f"{key} {value}" for key, value in experiment["options"].items())
    text = (
        f"Task `{experiment['task']}`{f' ({options})' if options else ''}, trained on lengths "
        f"{', then '.join(experiment['lengths'])}. {experiment['note']}"
    )
    places = [str(at) for at in experiment["measure"]]
    columns = ("model", "parameters", "learning rate", "seeds", "s a run", *places)
    caption = (
        f"{METRICS[metric]} against {over}, mean ± standard deviation over seeds; "
        f"{experiment['samples']} test samples a seed."
    )
    rows = [_model_row(model, group, experiment) for model, group in experiment["models"].items()]
    blocks: list[Block] = [Heading(name, 3), Text(text.strip()), Table(columns, rows, caption)]
    blocks += _share_tables(experiment)
    notes = [
        (model, group["note"]) for model, group in experiment["models"].items() if group["note"]
    ]
    if notes:
        blocks.append(Table(("", ""), notes, prose=True))
    if any(group["runs"] for group in experiment["models"].values()):
        blocks.append(
            Plot(
                name,
                _figure(experiment),
                f"{name}: {METRICS[metric]} against {over}; the band is the range of the seeds.",
            )
        )
    return blocks


def _share_tables(experiment: Values) -> list[Block]:
    """Which tokens models with selective attention select; nothing where there are none."""
    places = [str(at) for at in experiment["measure"]]
    rows = []
    for model, group in experiment["models"].items():
        for metric, what in SHARES.items():
            columns = [[run["measure"][at].get(metric) for run in group["runs"]] for at in places]
            if group["runs"] and columns[0][0] is not None:
                rows.append((model, what, *(mean_and_spread(column) for column in columns)))
    caption = "Share of the tokens that attend, mean ± standard deviation over seeds."
    return [Table(("model", "of", *places), rows, caption)] if rows else []


SHARES = {"selected": "all tokens", "selected_asked": "tokens that an answer is asked of"}
METRICS = {
    "string": "Samples with all answers right",
    "token": "Answers right",
    "last": "Last answers right",
    "scaled": "Accuracy of answers (0 = chance)",
    "scaled_last": "Accuracy of the last answer (0 = chance)",
}


def _model_row(model: str, group: Values, experiment: Values) -> tuple[str | Cell, ...]:
    places, metric = experiment["measure"], experiment["metric"]
    if not group["runs"]:
        return (model, "-", "-", "0", "-", *("-" for _ in places))
    cells = []
    for at in places:
        values = [run["measure"][str(at)][metric] for run in group["runs"]]
        shade = sum(values) / len(values)
        cells.append(Cell(mean_and_spread(values), shade, ", ".join(f"{v:.3f}" for v in values)))
    rate = f"{group['learning_rate']:g} of {', '.join(group['tried'])}"
    seconds = [sum(run["seconds"].values()) for run in group["runs"]]
    size, count = f"{group['runs'][0]['parameters']:,}", str(len(seconds))
    return (model, size, rate, count, f"{sum(seconds) / len(seconds):.0f}", *cells)


def mean_and_spread(values: Sequence[float]) -> str:
    """ "0.912 ± 0.034", or the value alone."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {spread:.3f}"


def _figure(experiment: Values) -> Figure:
    """Accuracy over length: the mean as a line, the range of the seeds as a band."""
    metric, places = experiment["metric"], experiment["measure"]
    figure, (axes,) = new_figure()
    for index, (model, group) in enumerate(experiment["models"].items()):
        if not group["runs"]:
            continue
        columns = [[run["measure"][str(at)][metric] for run in group["runs"]] for at in places]
        means = [sum(column) / len(column) for column in columns]
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        line(axes, index, model, places, means, low, high)
    axes.set_ylim(-0.25 if metric.startswith("scaled") else -0.03, 1.1)
    finish(
        axes,
        experiment["vary"] or "length",
        METRICS[metric],
        log_x=max(places) >= 4 * min(places),
        training_length=experiment["trained_to"],
    )
    return figure
