"""Results -> science.json, report.md with a plot for each experiment, and a table to print."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Values = dict[str, Any]


def write_report(results: Values, directory: Path) -> list[Path]:
    """Write science.json, report.md and one SVG for each experiment that has results."""
    files = render(results, directory)
    data = directory / "science.json"
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return [data, *files]


def render(results: Values, directory: Path) -> list[Path]:
    """Write report.md and the plots from the values of a science.json."""
    directory.mkdir(parents=True, exist_ok=True)
    plots = {
        name: _plot(name, experiment, directory)
        for name, experiment in results["experiments"].items()
        if any(model["runs"] for model in experiment["models"].values())
    }
    report = directory / "report.md"
    report.write_text(markdown(results, plots), encoding="utf-8")
    return [report, *plots.values()]


# --- text -----------------------------------------------------------------------------------------


def markdown(results: Values, plots: dict[str, Path]) -> str:
    """The report for people."""
    header = results["header"]
    lines = [f"# {header['title']}", ""]
    lines += _table(("", ""), header_rows(header))
    lines += ["", "## Claims", ""]
    lines += [
        "A verdict needs an effect beyond its resolution, the smallest that these seeds and test",
        "samples could have shown (95 %); within it the claim is not decided. Numbers are means",
        "over seeds at the model's best learning rate, with each seed in brackets.",
        "",
    ]
    lines += _table(("claim", "expected", "found", "verdict"), claim_rows(results))
    if results["controls"]:
        lines += ["", "## Controls", ""]
        lines += _table(
            ("control", "expected", "runs as expected", "verdict"), control_rows(results)
        )
    lines += ["", "## Experiments"]
    for name, experiment in results["experiments"].items():
        lines += _experiment(name, experiment, plots.get(name))
    for title, rows in (
        (
            "Failed runs",
            [f"{row['run']}: {row['error'].splitlines()[0]}" for row in results["failures"]],
        ),
        ("Runs whose inputs or memory are not as they should be", _flagged_lines(results)),
        ("Not run", results["unfinished"]),
    ):
        if rows:
            lines += ["", f"## {title}", "", *(f"- {row}" for row in rows)]
    return "\n".join(lines) + "\n"


def header_rows(header: Values) -> list[tuple[str, str]]:
    """What the numbers depend on, as (name, value)."""
    runs = header["runs"]
    rows = [
        ("suite", f"{header['suite']} (sha256 {header['suite_sha256'][:16]})"),
        ("device", header["device"]),
        (
            "runs",
            f"{runs['finished']} finished, {runs['failed']} failed, {runs['planned']} planned",
        ),
        ("workers", f"{header['workers']} at once"),
        (
            "time",
            f"{header['minutes']:.1f} minutes in this call, {header['run_minutes']:.1f} in runs",
        ),
        ("date", header["date"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in header["versions"].items())),
    ]
    return rows + ([("budget", header["budget"])] if header["budget"] else [])


def claim_rows(results: Values) -> list[tuple[str, ...]]:
    """(claim and source, expected, checks with resolution, verdict)."""
    rows = []
    for claim in results["claims"]:
        found = [_check_text(check) for check in claim["checks"]] or [claim["why_not"]]
        rows.append(
            (
                f"{claim['claim']} ({claim['source']})",
                claim["shape"],
                "<br>".join(found),
                f"**{claim['verdict']}**",
            )
        )
    return rows


def _check_text(check: Values) -> str:
    if check["effect"] is None:
        return check["text"]
    seen = "one seed: no resolution"
    if check["resolution"] is not None:
        seen = f"effect {check['effect']:+.3f}, smallest to be seen {check['resolution']:.3f}"
    return f"{check['text']}: {seen}, {check['verdict']}"


def control_rows(results: Values) -> list[tuple[str, ...]]:
    """(control, expected, runs as expected of all, verdict)."""
    return [
        (
            row["control"],
            row["expected"],
            f"{row['as_expected']} of {row['runs']}",
            f"**{row['verdict']}**",
        )
        for row in results["controls"]
    ]


def _flagged_lines(results: Values) -> list[str]:
    lines = []
    for row in results["flagged"]:
        says = []
        if row["leaks"]:
            worst = max(row["follows_labels"], row["sees_ahead"])
            says.append(f"reads what it must not ({worst:.0%} of its answers change)")
        if row["wiped"]:
            says.append(f"nothing older than {row['reach']} tokens reaches its outputs")
        lines.append(f"{row['run']}: {', '.join(says)}")
    return lines


def _experiment(name: str, experiment: Values, plot: Path | None) -> list[str]:
    metric = experiment["metric"]
    over = experiment["vary"] or "length"
    lines = ["", f"### {name}", ""]
    options = ", ".join(f"{key} {value}" for key, value in experiment["options"].items())
    lines.append(
        f"Task {experiment['task']}{f' ({options})' if options else ''}, trained on lengths "
        f"{', then '.join(experiment['lengths'])}. {experiment['note']}".strip()
    )
    lines += ["", f"{metric} accuracy over {over}, mean ± standard deviation over seeds:", ""]
    columns = ("model", "learning rate", "seeds", *(str(at) for at in experiment["measure"]))
    rows = []
    for model, group in experiment["models"].items():
        if not group["runs"]:
            rows.append((model, "-", "0", *("-" for _ in experiment["measure"])))
            continue
        cells = []
        for at in experiment["measure"]:
            values = [run["measure"][str(at)][metric] for run in group["runs"]]
            cells.append(mean_and_spread(values))
        rate = f"{group['learning_rate']:g} of {', '.join(group['tried'])}"
        rows.append((model, rate, str(len(group["runs"])), *cells))
    lines += _table(columns, rows)
    if plot is not None:
        lines += ["", f"![{name}: {metric} accuracy over {over}]({plot.name})"]
    return lines


def mean_and_spread(values: Sequence[float]) -> str:
    """ "0.912 ± 0.034", or the value alone."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {spread:.3f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def summary(results: Values) -> str:
    """The verdicts, for a terminal."""
    lines = []
    for row in results["claims"]:
        lines.append(f"{row['verdict'].upper():14} {row['claim']} ({row['source']})")
        lines.append(f"{'':14}   expected: {row['shape']}")
        lines += [f"{'':14}   {_check_text(check)}" for check in row["checks"]]
        if row["why_not"]:
            lines.append(f"{'':14}   {row['why_not']}")
    for row in results["controls"]:
        count = f"{row['as_expected']} of {row['runs']} runs"
        lines.append(
            f"{row['verdict'].upper():14} control: {row['control']}: {row['expected']}, {count}"
        )
    runs = results["header"]["runs"]
    lines.append(
        f"{runs['finished']} runs finished, {runs['failed']} failed, {runs['planned']} planned"
    )
    lines += [f"failed: {f['run']}: {f['error'].splitlines()[0]:.160}" for f in results["failures"]]
    return "\n".join(lines)


# --- plots ----------------------------------------------------------------------------------------


def _plot(name: str, experiment: Values, directory: Path) -> Path:
    """Accuracy over length: the mean as a line, each seed as a point, training shaded."""
    metric, places = experiment["metric"], experiment["measure"]
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for number, (model, group) in enumerate(experiment["models"].items()):
        if not group["runs"]:
            continue
        color = f"C{number}"
        values = [[run["measure"][str(at)][metric] for at in places] for run in group["runs"]]
        means = [sum(column) / len(column) for column in zip(*values, strict=True)]
        axes.plot(places, means, color=color, label=model)
        for line in values:
            axes.plot(places, line, ".", color=color, markersize=4, alpha=0.6)
    axes.axvline(experiment["trained_to"], color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        "trained to here",
        (experiment["trained_to"], 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -10),
        textcoords="offset points",
        fontsize=8,
        color="gray",
    )
    if max(places) >= 4 * min(places):
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(at) for at in places])
        axes.minorticks_off()
    axes.set_ylim(-0.05 if not metric.startswith("scaled") else -0.2, 1.05)
    axes.set_xlabel(experiment["vary"] or "length")
    axes.set_ylabel(f"{metric} accuracy")
    axes.set_title(f"{name}: {experiment['task']}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    path = directory / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
