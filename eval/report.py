"""Reports: results.json for machines; Markdown, plots and a text summary for people.

`python -m eval.report results.json` writes the Markdown and the plots again, from the JSON alone.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Results = dict[str, Any]
RESULTS_FILE = "results.json"
REPORT_FILE = "report.md"
BITS_PLOT = "bits_per_byte.png"
POSITION_PLOT = "loss_by_position.png"


def write_report(results: Results, directory: str | Path) -> list[Path]:
    """Write results.json, report.md and the plots.

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
    return [path, *render(results, directory)]


def render(results: Results, directory: Path) -> list[Path]:
    """Write report.md and the plots of `results` into a directory; returns the files."""
    report = directory / REPORT_FILE
    report.write_text(markdown(results), encoding="utf-8")
    files = [report]
    if "perplexity" in results:
        files += [_plot_bits(results, directory), _plot_positions(results, directory)]
    return files


# --- content ----------------------------------------------------------------------------------


def header_rows(results: Results) -> list[tuple[str, str]]:
    """Return what is known about model and run as (name, value) rows."""
    header = results["header"]
    model = header["model"]
    attention = model["attention_layers"]
    state = f"{model['state_bytes']:,} bytes per sequence"
    if model["state_bytes_per_token"]:
        state += f" + {model['state_bytes_per_token']:,} bytes per token"
    rows = [
        ("model", model["name"]),
        ("weights", model["weights"]),
        (
            "architecture",
            f"{model['architecture']} ({model['model_type']}), {model['layers']} layers"
            + (f" of which {attention} attention" if attention else "")
            + f", width {model['hidden_size']}, vocabulary {model['vocabulary']:,}",
        ),
        ("parameters", f"{model['parameters']:,} in {model['dtype']}"),
        ("state", state),
        ("tokenizer", model["tokenizer"]),
        ("document prefix", model["prefix"] or "none: the first token is not scored"),
        ("suite", header["suite_file"]),
        ("seed", str(header["seed"])),
        ("device", header["device"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in header["versions"].items())),
        ("date", header["date"]),
        ("time", ", ".join(f"{k} {v:.1f} s" for k, v in header["seconds"].items())),
    ]
    if "perplexity" in results:
        section = results["perplexity"]
        carried = "state carried through each document" if section["stateful"] else "state reset"
        rows.append(("perplexity window", f"{section['window']:,} tokens, {carried}"))
    if "lm_eval" in results:
        limit = results["lm_eval"]["max_length"]
        rows.append(("lm_eval max_length", "unlimited" if limit is None else f"{limit:,} tokens"))
    return rows


def bits_rows(results: Results, file: str) -> list[tuple[str, str, str]]:
    """Return (system, bits per byte, saving of the model in %) rows for one file, model first."""
    score = next(f for f in results["perplexity"]["files"] if f["file"] == file)
    rows = [("this model", f"{score['bits_per_byte']:.4f}", "")]
    for order, bits in _baselines(results, file).items():
        saving = 100 * (1 - score["bits_per_byte"] / bits)
        rows.append((f"byte n-gram, order {order}", f"{bits:.4f}", f"{saving:+.1f} %"))
    return rows


def _baselines(results: Results, file: str) -> dict[str, float]:
    """Return order -> bits per byte of the n-grams on one file."""
    files = results["ngram"]["files"] if "ngram" in results else []
    return next((f["bits_per_byte"] for f in files if f["file"] == file), {})


def perplexity_rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row of sizes and scores per file."""
    return [
        (
            f["file"],
            f"{f['documents']:,}",
            f"{f['bytes']:,}",
            f"{f['tokens']:,}",
            f"{f['bits_per_byte']:.4f}",
            f"{f['nats_per_token']:.4f}",
            _number(f["token_perplexity"], ".3f"),
            _number(f["word_perplexity"], ".4g"),
        )
        for f in results["perplexity"]["files"]
    ]


PERPLEXITY_COLUMNS = (
    "file",
    "documents",
    "bytes",
    "tokens",
    "bits/byte",
    "nats/token",
    "token ppl",
    "word ppl",
)
BITS_COLUMNS = ("system", "bits/byte", "model is better by")
ZERO_SHOT_COLUMNS = ("task", "metric", "value", "stderr", "n", "in papers")


def zero_shot_rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row per task and metric, and the papers' mean when it is complete."""
    rows = []
    for name, task in results["lm_eval"]["tasks"].items():
        for metric, score in task["metrics"].items():
            # Perplexities of weak models are huge.
            spec = ".4f" if score["value"] < 1000 else ".3e"
            value, stderr = _number(score["value"], spec), _number(score["stderr"], spec)
            reported = "yes" if metric in task["reported"] else ""
            rows.append((name, metric, value, stderr, str(task["n"]), reported))
    for name, value in results["lm_eval"]["averages"].items():
        rows.append((f"mean: {name}", "", f"{value:.4f}", "", "", "yes"))
    return rows


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


# --- Markdown ---------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Write the whole report."""
    parts = [
        f"# Evaluation of {results['header']['model']['name']}",
        _markdown_table(("", ""), header_rows(results)),
    ]
    if results["checks"]:
        rows = [
            (c["name"], "passed" if c["passed"] else "FAILED", c["detail"])
            for c in results["checks"]
        ]
        parts += ["## Checks", _markdown_table(("check", "result", "measured"), rows)]
    if "perplexity" in results:
        parts += _perplexity_markdown(results)
    if "lm_eval" in results:
        parts += _zero_shot_markdown(results)
    if "generate" in results:
        parts += ["## Samples", _sampling_line(results["generate"])]
        for sample in results["generate"]["samples"]:
            text = sample["prompt"] + sample["text"]
            # A fence longer than any run of backticks in the text cannot be closed by it.
            runs = [len(run) for run in re.findall("`+", text)]
            fence = "`" * (max([2, *runs]) + 1)
            parts.append(f"Prompt {sample['prompt']!r}, {sample['tokens']} tokens:")
            parts.append(f"{fence}text\n{text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _perplexity_markdown(results: Results) -> list[str]:
    section = results["perplexity"]
    parts = [
        "## Held-out text",
        "Bytes are UTF-8 bytes of the text, words are separated by white space; the token that "
        "ends a document is not scored. "
        + (
            f"Of each file at most the first {section['max_bytes']:,} bytes were used."
            if section["max_bytes"]
            else "All of each file was used."
        ),
        _markdown_table(PERPLEXITY_COLUMNS, perplexity_rows(results)),
    ]
    if "ngram" in results:
        ngram = results["ngram"]
        parts.append(
            f"Baselines: Witten-Bell interpolated byte n-grams (order = bytes of context), trained "
            f"on the {ngram['bytes']:,} bytes in `{ngram['seen_tokens']}`, the tokens that the "
            "model was trained on, and scored on the same documents."
        )
        for score in section["files"]:
            rows = bits_rows(results, score["file"])
            parts += [f"`{score['file']}`:", _markdown_table(BITS_COLUMNS, rows)]
    parts += [
        f"![Bits per byte]({BITS_PLOT})",
        f"![Loss by position]({POSITION_PLOT})",
        _markdown_table(("file", "SHA-256"), [(f["file"], f["sha256"]) for f in section["files"]]),
    ]
    return parts


def _zero_shot_markdown(results: Results) -> list[str]:
    section = results["lm_eval"]
    limited = "" if section["limit"] is None else f", only the first {section['limit']} questions"
    files = [
        (name, task["file"] or "Hugging Face Hub", task["sha256"] or "-")
        for name, task in section["tasks"].items()
    ]
    return [
        "## Zero-shot tasks",
        f"lm-evaluation-harness' own prompts and metrics, no examples in the prompt{limited}. "
        "acc_norm divides log-likelihoods by the length of the answer in characters; perplexity "
        "is per last word.",
        _markdown_table(ZERO_SHOT_COLUMNS, zero_shot_rows(results)),
        _markdown_table(("task", "data", "SHA-256"), files),
    ]


def _sampling_line(section: dict[str, Any]) -> str:
    if not section["do_sample"]:
        return "Greedy: always the likeliest token."
    return (
        f"Sampled with temperature {section['temperature']}, top_k {section['top_k'] or 'off'}, "
        f"top_p {section['top_p']}, seed {section['seed']}."
    )


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


# --- text summary -----------------------------------------------------------------------------


def summary(results: Results, files: Sequence[Path]) -> str:
    """Write what a terminal shows at the end of a run."""
    model = results["header"]["model"]
    shown = ("architecture", "parameters", "state", "device", "time")
    facts = [row for row in header_rows(results) if row[0] in shown]
    parts = [f"=== Evaluation of {model['name']} ===", _lines(facts)]
    if "perplexity" in results and "ngram" not in results:
        table = _text_table(PERPLEXITY_COLUMNS, perplexity_rows(results))
        parts.append(f"Held-out text\n{table}")
    if "ngram" in results:
        for score in results["perplexity"]["files"]:
            parts.append(
                f"Held-out bits per byte (lower is better): {score['file']}, "
                f"{score['documents']:,} documents, {score['bytes']:,} bytes\n"
                + _text_table(BITS_COLUMNS, bits_rows(results, score["file"]))
            )
    if "lm_eval" in results:
        parts.append("Zero-shot tasks\n" + _text_table(ZERO_SHOT_COLUMNS, zero_shot_rows(results)))
    if "generate" in results:
        sample = results["generate"]["samples"][0]
        text = sample["prompt"] + sample["text"]
        # Control characters of an untrained model would garble the terminal.
        clean = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
        quoted = "\n".join("  | " + line for line in clean.split("\n"))
        parts.append(f"Sample for the prompt {sample['prompt']!r}\n{quoted}")
    if results["checks"]:
        rows = [
            ("passed" if check["passed"] else "FAILED", f"{check['name']}: {check['detail']}")
            for check in results["checks"]
        ]
        parts.append("Checks\n" + _lines(rows))
    parts.append("Files\n" + _lines([(file.suffix[1:], str(file)) for file in files]))
    return "\n\n".join(parts)


def _lines(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left and the others to the right."""
    table = [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return ("  " + "  ".join(cells)).rstrip()

    rule = "  " + "  ".join("-" * width for width in widths)
    return "\n".join([line(columns), rule, *map(line, rows)])


# --- plots ------------------------------------------------------------------------------------


def _plot_bits(results: Results, directory: Path) -> Path:
    """Draw bits per byte of model and baselines as bars, one panel per file."""
    files = results["perplexity"]["files"]
    figure = Figure(figsize=(6.4, 1.2 + 1.8 * len(files)), layout="constrained")
    panels = figure.subplots(len(files), squeeze=False)[:, 0]
    for axes, score in zip(panels, files, strict=True):
        baselines = _baselines(results, score["file"])
        labels = ["this model", *(f"order-{order} bytes" for order in baselines)]
        values = [score["bits_per_byte"], *baselines.values()]
        bars = axes.barh(labels, values, color=["C0"] + ["0.7"] * len(baselines), height=0.6)
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(values))
        axes.set_title(score["file"], fontsize=9, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("bits per byte (lower is better)")
    path = directory / BITS_PLOT
    figure.savefig(path, dpi=120)
    return path


def _plot_positions(results: Results, directory: Path) -> Path:
    """Draw the mean loss against the number of tokens read, one line per file."""
    section = results["perplexity"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for score in section["files"]:
        # Position 0 sits at 1 on the logarithmic axis, every other range at its middle.
        middle = [max((p["start"] + p["end"] - 1) / 2, 0) + 1 for p in score["curve"]]
        loss = [p["nats"] for p in score["curve"]]
        (line,) = axes.plot(middle, loss, marker="o", markersize=4)
        # Set, not passed: matplotlib hides legend labels that begin with an underscore.
        line.set_label(score["file"].lstrip("_"))
    since = "start of the document" if section["stateful"] else "start of the window"
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"tokens read since the {since} (plus 1)")
    axes.set_ylabel("mean loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    path = directory / POSITION_PLOT
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report again from its JSON."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=main.__doc__)
    parser.add_argument("results", type=Path, help="results.json of a run")
    path = parser.parse_args(arguments).results
    results = json.loads(path.read_text(encoding="utf-8"))
    print(summary(results, [path, *render(results, path.parent)]))


if __name__ == "__main__":
    main()
