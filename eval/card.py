"""Model cards from results.json: numbers are filled in, what people wrote stays.

    python -m eval.card RUN/results.json [MORE/results.json ...] --name mamba2-130m

writes the card as README.md into the model's directory and as <name>.md into model_cards/. What
lies between `<!-- begin: X -->` and `<!-- end: X -->` is written anew, with the metadata's
`model-index`; the rest of the text and of the metadata is kept. A model without a card begins with
model_cards/template.md.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from eval.blocks import THIS, Heading, Run, Table, Text, to_markdown
from eval.report import REPORTS, read_results
from eval.report_header import header_rows

CARDS = Path(__file__).parents[1] / "model_cards"
TEMPLATE = CARDS / "template.md"
PARTS = ("model", "training", "evaluation", "limits")


def check_same_model(runs: Sequence[Run]) -> None:
    """Raise ValueError unless all results are of the same weights."""
    weights = {run.results["header"]["model"]["weights"] for run in runs}
    if len(weights) > 1:
        raise ValueError(f"a card is of one model, but these results are of {sorted(weights)}")


# --- what is filled in ------------------------------------------------------------------------


def model_part(runs: Sequence[Run]) -> str:
    """The table of facts about the model."""
    facts = dict(header_rows(runs[0].results))
    names = ("architecture", "parameters", "state", "tokenizer", "document prefix", "weights")
    return _facts([(name, facts[name]) for name in names])


def training_part(runs: Sequence[Run]) -> str:
    """The table of what the training run left, or a sentence that there is none."""
    facts = dict(header_rows(runs[0].results))
    if "training" not in facts:
        return "No training run lies beside the model; see the source of the weights."
    return _facts([(name, facts[name]) for name in ("training", "training length")])


def evaluation_part(runs: Sequence[Run]) -> str:
    """Every run's command, conditions and tables."""
    blocks: list[Heading | Text | Table] = []
    for run in runs:
        header = run.results["header"]
        blocks.append(Text(f"`{header['command']}`"))
        versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
        blocks.append(Text(f"{header['date'][:10]}, {header['device']}, {versions}."))
        for name, show in REPORTS.items():
            if name == "generate" or name not in run.results:
                continue
            for block in show([run]):
                if isinstance(block, Heading):
                    blocks.append(Heading(block.text, block.level + 1))
                elif isinstance(block, Text) or (isinstance(block, Table) and not block.detail):
                    blocks.append(block)
    return to_markdown(blocks, "").strip()


def limits_part(runs: Sequence[Run]) -> str:
    """What the measurements say about where the model ends."""
    lines = []
    for run in runs:
        header = run.results["header"]
        if header["training_length"] is not None:
            lines.append(f"Trained on rows of {header['training_length']:,} tokens.")
        if "length" in run.results:
            lines += _length_limits(run.results["length"])
        if "ruler" in run.results:
            lines += _ruler_limits(run.results["ruler"])
        for check in run.results["checks"]:
            if not check["passed"]:
                lines.append(f"Failed: {check['name']} ({check['detail']}).")
    lines = list(dict.fromkeys(lines))
    return "\n".join(f"- {line}" for line in lines) or "- No limit was measured."


def _length_limits(section: dict[str, Any]) -> list[str]:
    known = [p for p in section["a"] if p["perplexity"] is not None]
    lines = []
    if known:
        best = min(known, key=lambda p: p["perplexity"])
        last = max(known, key=lambda p: p["window"])
        lines.append(
            f"Perplexity of the last {section['last']} tokens is lowest at {best['window']:,} "
            f"tokens of context ({best['perplexity']:.2f}), and {last['perplexity']:.2f} at "
            f"{last['window']:,}, the longest measured."
        )
    lines += [
        f"Perplexity at {p['window']:,} tokens was not measured: {p['reason']}."
        for p in section["a"]
        if p["perplexity"] is None
    ][:1]
    return lines


def _ruler_limits(section: dict[str, Any]) -> list[str]:
    means = [
        f"{row['mean']:.1f} at {row['length']:,}"
        for row in section["means"]
        if row["mean"] is not None
    ]
    return [f"RULER, mean of {len(section['averaged'])} tasks: {', '.join(means)} tokens."]


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    return to_markdown([Table(("", ""), rows, prose=True)], "").strip()


# --- metadata ---------------------------------------------------------------------------------


def eval_results(runs: Sequence[Run]) -> list[EvalResult]:
    """Return the numbers of the Hub's `model-index`."""
    found = []
    for run in runs:
        results, command = run.results, run.results["header"]["command"]
        for task, scores in results.get("lm_eval", {}).get("tasks", {}).items():
            for metric in scores["reported"]:
                found.append(_result(task, task, metric, scores["metrics"][metric]["value"]))
        for score in results.get("perplexity", {}).get("files", []):
            name = Path(score["file"]).name
            found.append(_result(name, name, "bits_per_byte", score["bits_per_byte"]))
        for point in results.get("length", {}).get("a", []):
            if point["perplexity"] is not None:
                name = f"perplexity at {point['window']} tokens"
                files = ", ".join(Path(f["file"]).name for f in results["length"]["files"])
                found.append(_result(files, files, name, point["perplexity"]))
        for row in results.get("ruler", {}).get("means", []):
            if row["mean"] is not None:
                name = f"RULER at {row['length']} tokens"
                found.append(_result("ruler", name, "mean score", row["mean"]))
        for result in found:
            result.metric_args = result.metric_args or {"command": command}
    return found


def _result(kind: str, name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=name,
        metric_type=metric,
        metric_value=round(value, 4),
        verified=False,
    )


# --- the card ---------------------------------------------------------------------------------


def fill(card: str, name: str, runs: Sequence[Run]) -> str:
    """Return a card with its numbers written anew.

    Args:
        card: text of the present card, or of the template.
        name: of the model, in the metadata.
        runs: results of one model.

    Raises:
        ValueError: results of several models, a card without one of the pairs of markers, or
            metadata that is not YAML.
    """
    check_same_model(runs)
    made = {
        "model": model_part(runs),
        "training": training_part(runs),
        "evaluation": evaluation_part(runs),
        "limits": limits_part(runs),
    }
    for part in PARTS:
        begin, end = f"<!-- begin: {part} -->", f"<!-- end: {part} -->"
        if card.count(begin) != 1 or card.count(end) != 1:
            raise ValueError(f"the card must have {begin} and {end} once each")
        before, rest = card.split(begin)
        _, after = rest.split(end)
        card = f"{before}{begin}\n{made[part]}\n{end}{after}"
    parsed = ModelCard(card)
    parsed.data.model_name = name
    parsed.data.eval_results = eval_results(runs)
    parsed.data.tags = list(parsed.data.tags or ["ssm_hf"])
    # Only once: a card that is filled in again has its name already.
    parsed.text = re.sub(r"\{name\}", name, parsed.text)
    return f"---\n{parsed.data.to_yaml()}\n---\n{parsed.text.rstrip()}\n"


def write_card(runs: Sequence[Run], name: str, cards: Path = CARDS) -> list[Path]:
    """Write the card of a model into its directory (if it is one) and into `cards`.

    The card in `cards` is the one that people edit; that in the model's directory is its copy.

    Raises:
        ValueError: see `fill`.
    """
    path = cards / f"{name}.md"
    source = path if path.is_file() else TEMPLATE
    text = fill(source.read_text(encoding="utf-8"), name, runs)
    directory = Path(runs[0].results["header"]["model"]["name"])
    paths = [path, *([directory / "README.md"] if directory.is_dir() else [])]
    for target in paths:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a model's card from its results."""
    parser = argparse.ArgumentParser(prog="python -m eval.card", description=main.__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="results.json of a run, or its folder"
    )
    parser.add_argument("--name", required=True, help="of the model, and of the file")
    parser.add_argument("--cards", type=Path, default=CARDS, help="folder of all cards")
    options = parser.parse_args(arguments)
    runs = [Run(THIS, read_results(path)) for path in options.results]
    print("\n".join(map(str, write_card(runs, options.name, options.cards))))


if __name__ == "__main__":
    main()
