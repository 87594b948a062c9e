"""What stands at the top of a report: facts, the numbers wanted first, checks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.blocks import THIS, Block, Cell, Heading, Results, Run, Table


def number(value: float | None, spec: str) -> str:
    """Format a value; a dash stands for one that is not known."""
    return "–" if value is None else format(value, spec)


def alone(runs: Sequence[Run]) -> bool:
    """Whether a report is of one run, which needs no name."""
    return [run.name for run in runs] == [THIS]


def beside(name: str, runs: Sequence[Run]) -> list[str]:
    """Return column names: `name` in a report of one run, the runs' names in one of several."""
    return [name] if alone(runs) else [run.name for run in runs]


def header_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is known about model and run as (name, value) rows."""
    header = results["header"]
    model = header["model"]
    attention = model["attention_layers"]
    state = f"{model['state_bytes']:,} bytes per sequence"
    if model["state_bytes_per_token"]:
        state += f" + {model['state_bytes_per_token']:,} bytes per token"
    state += f", {' and '.join(model['state_dtypes'])}, as measured on the cache"
    if not model["state_dtypes"]:
        state = "the model returns no cache"
    length = header["training_length"]
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
        ("training length", "not known" if length is None else f"{length:,} tokens"),
        ("tokenizer", model["tokenizer"]),
        ("document prefix", model["prefix"] or "none: the first token is not scored"),
        ("suite", header["suite_file"]),
        ("seed", str(header["seed"])),
        ("commit", header["commit"] or "not known"),
        ("device", header["device"]),
        ("processes", str(header["processes"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in header["versions"].items())),
        ("command", f"`{header['command']}`"),
        ("date", header["date"]),
        ("time", ", ".join(f"{k} {v:.1f} s" for k, v in header["seconds"].items())),
        ("identity", model["identity"]),
    ]
    training = header["training"]
    if training:
        at = [f"{training['tokens']:,} tokens in {training['steps']:,} steps"]
        if training["train_loss"] is not None and training["heldout_loss"] is not None:
            gap = training["heldout_loss"] - training["train_loss"]
            at.append(
                f"loss {training['train_loss']:.4f}, held-out {training['heldout_loss']:.4f} "
                f"(gap {gap:+.4f} nats per token)"
            )
        rows.insert(6, ("training", "; ".join(at) + f"; `{training['config']}`"))
    if "lm_eval" in results:
        section = results["lm_eval"]
        limit = section["max_length"]
        rows += [
            ("zero-shot max_length", "unlimited" if limit is None else f"{limit:,} tokens"),
            ("zero-shot bos", section["bos"]),
            ("zero-shot batch", f"{section['batch_size']} requests, padded on the right, no mask"),
        ]
    return rows


def header_blocks(runs: Sequence[Run]) -> list[Block]:
    """Show the facts that matter at once, and all settings folded."""
    tables = [dict(header_rows(run.results)) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    columns = ["", ""] if alone(runs) else ["", *(run.name for run in runs)]
    first = ("model", "architecture", "parameters", "state", "training length", "training")
    short = [name for name in (*first, "device", "date") if name in names]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [[name, *(table.get(name, "–") for table in tables)] for name in chosen]

    return [
        Table(columns, rows(short), prose=True),
        Table(
            columns,
            rows(names),
            "Every setting, version and hash of the run",
            detail=True,
            prose=True,
        ),
    ]


# Section of results.json -> the few numbers of it that a reader wants first, as (what, value).
Glance = Callable[[Results], list[tuple[str, str]]]


def glance_blocks(runs: Sequence[Run], sections: Mapping[str, Glance]) -> list[Block]:
    """Show the few numbers that a reader wants first, a column per run."""
    tables = [
        dict(
            row
            for name, show in sections.items()
            if name in run.results
            for row in show(run.results)
        )
        for run in runs
    ]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return []
    rows = [[name, *(table.get(name, "–") for table in tables)] for name in names]
    columns = ["", *beside("value", runs)]
    return [Heading("At a glance"), Table(columns, rows)]


def check_blocks(runs: Sequence[Run]) -> list[Block]:
    """Show the checks that a suite asked for."""
    rows = [
        [
            *([] if alone(runs) else [run.name]),
            check["name"],
            Cell("passed", 1.0) if check["passed"] else Cell("FAILED", 0.0),
            check["detail"],
        ]
        for run in runs
        for check in run.results["checks"]
    ]
    if not rows:
        return []
    columns = ["check", "result", "measured"]
    return [Heading("Checks"), Table(columns if alone(runs) else ["run", *columns], rows)]
