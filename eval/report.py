"""Reports: results.json for machines; HTML, Markdown and a text summary for people.

    python -m eval.report RESULTS.json [MORE.json ...] --output DIR

writes the report of one run again, or puts several runs side by side, from their JSON alone.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from eval.blocks import (
    THIS,
    Block,
    Heading,
    Results,
    Run,
    to_html,
    to_markdown,
    to_text,
    write_plots,
)
from eval.report_header import Glance, check_blocks, glance_blocks, header_blocks
from eval.report_sections import (
    consistency_blocks,
    efficiency_blocks,
    efficiency_glance,
    length_blocks,
    length_glance,
    perplexity_blocks,
    perplexity_glance,
    sample_blocks,
    zero_shot_blocks,
    zero_shot_glance,
)
from eval.ruler.report import ruler_blocks, ruler_glance
from eval.text_tasks import text_task_blocks, text_task_glance

FORMAT = 1  # of results.json; another one is refused
RESULTS_FILE = "results.json"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
PLOTS = "plots"

# Section of results.json -> what it shows, in the order of the report. `ngram` stands beside
# `perplexity`.
REPORTS: dict[str, Callable[[Sequence[Run]], list[Block]]] = {
    "perplexity": perplexity_blocks,
    "length": length_blocks,
    "lm_eval": zero_shot_blocks,
    "text_tasks": text_task_blocks,
    "ruler": ruler_blocks,
    "consistency": consistency_blocks,
    "efficiency": efficiency_blocks,
    "generate": sample_blocks,
}

# What of them stands at the top.
GLANCES: dict[str, Glance] = {
    "perplexity": perplexity_glance,
    "length": length_glance,
    "lm_eval": zero_shot_glance,
    "text_tasks": text_task_glance,
    "ruler": ruler_glance,
    "efficiency": efficiency_glance,
}


def report_blocks(runs: Sequence[Run]) -> list[Block]:
    """Return the whole report of one run, or of several side by side."""
    blocks = [*header_blocks(runs), *glance_blocks(runs, GLANCES), *check_blocks(runs)]
    for name, show in REPORTS.items():
        having = [run for run in runs if name in run.results]
        if having:
            blocks += show(having)
    return blocks


def title(runs: Sequence[Run]) -> str:
    """Return the headline of a report."""
    if len(runs) == 1:
        return f"Evaluation of {short_name(runs[0].results['header']['model']['name'])}"
    return "Evaluation: " + ", ".join(run.name for run in runs)


def write_report(results: Results, directory: str | Path) -> list[Path]:
    """Write results.json, report.html, report.md and the plots.

    Args:
        results: what `eval.run` collects, JSON values only.
        directory: created if needed; files of the same names are replaced.

    Returns:
        The files, the JSON first.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RESULTS_FILE
    # NaN and infinity are not JSON: better no file than one that others cannot read.
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [path, *render([Run(THIS, results)], directory)]


def render(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write report.html, report.md and the plots of runs into a directory; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    blocks = report_blocks(runs)
    page, report = directory / HTML_FILE, directory / MARKDOWN_FILE
    made = "Made by `python -m eval.report` from results.json alone."
    page.write_text(to_html(title(runs), blocks, made), encoding="utf-8")
    heading = Heading(title(runs), 1)
    report.write_text(to_markdown([heading, *blocks], PLOTS), encoding="utf-8")
    return [page, report, *write_plots(blocks, directory / PLOTS)]


def summary(runs: Sequence[Run], files: Sequence[Path]) -> str:
    """Write what a terminal shows at the end of a run."""
    shown = [file for file in files if file.parent.name != PLOTS]
    listed = "\n".join(f"  {file.suffix[1:]:<5} {file}" for file in shown)
    text = to_text(report_blocks(runs))
    return f"=== {title(runs)} ===\n\n{text}\n\nFiles\n{listed}"


def read_results(path: Path) -> Results:
    """Read a results.json, or that of a folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not one of `eval.run`.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["header"]["model"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results.json of eval.run: {error!r}") from error
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {data.get('format')}, expected {FORMAT}: start its command again, "
            f"finished samples are kept: {data['header'].get('command')}"
        )
    return data


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read results; several runs are named by what tells their models' paths apart."""
    results = [read_results(path) for path in paths]
    if len(results) == 1:
        return [Run(THIS, results[0])]
    names = run_names([data["header"]["model"]["name"] for data in results])
    return [Run(name, data) for name, data in zip(names, results, strict=True)]


def short_name(model: str) -> str:
    """Shorten a model's path: `runs/demo/final` -> `demo`; a Hub name stays as it is."""
    parts = Path(model).parts
    if Path(model).is_absolute() or len(parts) > 2 or parts[-1] == "final":
        return parts[-2] if parts[-1] == "final" and len(parts) > 1 else parts[-1]
    return model


def run_names(models: Sequence[str]) -> list[str]:
    """Name runs by what tells their models apart, with a number in front where nothing does."""
    names = [short_name(model) for model in models]
    if len(set(names)) < len(names):
        names = [f"{i + 1}: {model}" for i, model in enumerate(models)]
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report again from its JSON, or one of several runs side by side."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=main.__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="results.json of a run, or its folder"
    )
    parser.add_argument("--output", type=Path, help="folder; default: that of a single run")
    options = parser.parse_args(arguments)
    runs = read_runs(options.results)
    if options.output is None and len(runs) > 1:
        parser.error("several runs need --output")
    path = options.results[0]
    output = options.output or (path if path.is_dir() else path.parent)
    print(summary(runs, render(runs, output)))


if __name__ == "__main__":
    main()
