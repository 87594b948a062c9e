"""What the engine's own sections show in a report, one run or several side by side.

Every function takes the runs that have its section and returns blocks. Values are taken as they are
in results.json; what is shown beside them (n, intervals) is said in the captions.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.blocks import Block, Cell, Heading, Plot, Results, Run, Table, Text, Verbatim
from eval.plots import finish, line, new_figure, short_length
from eval.report_header import alone, beside, number

# --- at a glance ------------------------------------------------------------------------------


def perplexity_glance(results: Results) -> list[tuple[str, str]]:
    return [
        (
            f"bits per byte, {Path(f['file']).name}",
            f"{_bits(f)} (n = {f['tokens']:,} tokens)",
        )
        for f in results["perplexity"]["files"]
    ]


def length_glance(results: Results) -> list[tuple[str, str]]:
    known = [p for p in results["length"]["a"] if p["perplexity"] is not None]
    return [
        (f"perplexity with {p['window']:,} tokens of context", _interval(p))
        for p in ([known[0], known[-1]] if len(known) > 1 else known)
    ]


def zero_shot_glance(results: Results) -> list[tuple[str, str]]:
    section = results["lm_eval"]
    means = [
        (f"zero-shot average ({name})", _score_text(score))
        for name, score in section["averages"].items()
    ]
    if means:
        return means
    return [
        (f"{name}, {metric}", f"{_score_text(task['metrics'][metric])} (n = {task['n']:,})")
        for name, task in section["tasks"].items()
        for metric in task["reported"]
    ]


def efficiency_glance(results: Results) -> list[tuple[str, str]]:
    section = results["efficiency"]
    batch = max(section["batch_sizes"])
    rows = []
    for point in section["lengths"]:
        speed = point["decode"][str(batch)].get("tokens_per_s")
        value = "not possible" if speed is None else f"{speed:,.0f} tokens/s"
        rows.append((f"decoding, batch {batch}, after {point['length']:,} tokens", value))
    return [rows[0], rows[-1]] if len(rows) > 1 else rows


# --- held-out text ----------------------------------------------------------------------------


def perplexity_blocks(runs: Sequence[Run]) -> list[Block]:
    """Bits per byte and perplexities of whole files, n-grams beside them, and loss by position."""
    section = runs[0].results["perplexity"]
    blocks: list[Block] = [
        Heading("Held-out text"),
        Text(
            "Bytes are UTF-8 bytes of the text, words are separated by white space; the token that "
            "ends a document is not scored. "
            + (
                f"Of each file at most the first {section['max_bytes']:,} bytes were read. "
                if section["max_bytes"]
                else "All of each file was read. "
            )
            + (
                "The state is carried through each document"
                if section["stateful"]
                else f"The state is reset every {section['window']:,} tokens"
            )
            + f" (windows of {section['window']:,} tokens)."
        ),
    ]
    for file in dict.fromkeys(f["file"] for run in runs for f in _files(run)):
        blocks += _file_blocks(runs, file)
    baseline = next((run.results["ngram"] for run in runs if "ngram" in run.results), None)
    if baseline is not None:
        blocks.append(
            Text(
                "Baselines: Witten-Bell interpolated byte n-grams (order = bytes of context), "
                f"trained on the {baseline['bytes']:,} bytes in `{baseline['seen_tokens']}`, the "
                "tokens that the model was trained on, and scored on the same documents."
            )
        )
    hashes = {f["file"]: f["sha256"] for run in runs for f in _files(run)}
    blocks += [
        _bits_plot(runs),
        _position_plot(runs),
        Table(("file", "SHA-256"), list(hashes.items()), "Hashes of the files", detail=True),
    ]
    return blocks


def _files(run: Run) -> list[dict[str, Any]]:
    return run.results["perplexity"]["files"]


def _score(run: Run, file: str) -> dict[str, Any] | None:
    return next((f for f in _files(run) if f["file"] == file), None)


def _baselines(run: Run, file: str) -> dict[str, float]:
    """Return order -> bits per byte of the n-grams on one file."""
    files = run.results["ngram"]["files"] if "ngram" in run.results else []
    return next((f["bits_per_byte"] for f in files if f["file"] == file), {})


def _file_blocks(runs: Sequence[Run], file: str) -> list[Block]:
    rows: list[list[str]] = []
    baselines: dict[str, float] = {}
    size = ""
    for run in runs:
        score = _score(run, file)
        if score is None:
            continue
        size = f"{score['documents']:,} documents, {score['bytes']:,} bytes"
        rows.append(
            [
                run.name,
                _bits(score),
                "",
                f"{score['nats_per_token']:.4f}",
                number(score["token_perplexity"], ".5g"),
                number(score["word_perplexity"], ".4g"),
                f"{score['tokens']:,}",
            ]
        )
        baselines |= _baselines(run, file)
    best = min(s["bits_per_byte"] for run in runs if (s := _score(run, file)) is not None)
    for order, bits in baselines.items():
        more = f"{100 * (bits / best - 1):+.1f} %"
        rows.append([f"byte n-gram, order {order}", f"{bits:.4f}", more, "–", "–", "–", "–"])
    beside_best = "against the model" if alone(runs) else "against the best"
    columns = ("", "bits/byte", beside_best, "nats/token", "token ppl", "word ppl", "n tokens")
    if not baselines:
        columns, rows = columns[:2] + columns[3:], [row[:2] + row[3:] for row in rows]
    spread = "± is one standard error, from the spread over documents"
    caption = f"`{file}`: {size}. Lower is better; {spread}."
    return [Table(columns, rows, caption)]


def _bits(score: dict[str, Any]) -> str:
    value, stderr = score["bits_per_byte"], score["bits_per_byte_stderr"]
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _bits_plot(runs: Sequence[Run]) -> Plot:
    """Draw bits per byte as bars, one panel per file."""
    files = list(dict.fromkeys(f["file"] for run in runs for f in _files(run)))
    bars = max(len(runs) + len(_baselines(runs[0], file)) for file in files)
    figure, panels = new_figure(7.2, (0.7 + 0.32 * bars) * len(files) + 0.3, rows=len(files))
    for axes, file in zip(panels, files, strict=True):
        scores = {
            run.name: score["bits_per_byte"]
            for run in runs
            if (score := _score(run, file)) is not None
        }
        baselines = {
            f"order-{k} bytes": v for run in runs for k, v in _baselines(run, file).items()
        }
        values = {**scores, **baselines}
        colours = ["#1f5a7a"] * len(scores) + ["#c9c5bb"] * len(baselines)
        drawn = axes.barh(list(values), list(values.values()), color=colours, height=0.62)
        axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8.5)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(values.values()))
        axes.grid(visible=False)
        finish(axes, "bits per byte" if file == files[-1] else "", "", title=file)
    return Plot("bits_per_byte", figure, "Bits per byte on held-out text; shorter bars are better.")


def _position_plot(runs: Sequence[Run]) -> Plot:
    figure, (axes,) = new_figure()
    curves = [(run, score) for run in runs for score in _files(run)]
    for i, (run, score) in enumerate(curves):
        # Position 0 sits at 1 on the logarithmic axis, every other range at its middle.
        middle = [max((p["start"] + p["end"] - 1) / 2, 0) + 1 for p in score["curve"]]
        name = score["file"] if alone(runs) else f"{run.name}: {score['file']}"
        line(axes, i, name, middle, [p["nats"] for p in score["curve"]])
    stateful = runs[0].results["perplexity"]["stateful"]
    since = "document" if stateful else "window"
    finish(
        axes,
        f"tokens read since the start of the {since} (plus 1)",
        "mean loss, nats per token",
        log_x=True,
        training_length=_shared_length(runs) if stateful else None,
    )
    return Plot(
        "loss_by_position",
        figure,
        "Mean loss by the number of tokens read before, in ranges that double. A model that uses "
        "its context falls from left to right.",
    )


def _shared_length(runs: Sequence[Run]) -> int | None:
    """The training length of all runs, None where they differ."""
    lengths = {run.results["header"]["training_length"] for run in runs}
    return lengths.pop() if len(lengths) == 1 else None


# --- perplexity against length ----------------------------------------------------------------


def length_blocks(runs: Sequence[Run]) -> list[Block]:
    """Both definitions of perplexity against length."""
    section = runs[0].results["length"]
    blocks: list[Block] = [
        Heading("Perplexity against length"),
        Text(
            f"**A**: the last {section['last']} tokens of windows of length W, at the same places "
            "of each file for every W, so that only the context differs. **B**: one long block "
            f"of each file, in ranges of {section['bucket']:,} positions. Intervals are 95 %, from "
            "the spread over windows (A) and over files (B)."
        ),
    ]
    windows = list(dict.fromkeys(p["window"] for run in runs for p in run.results["length"]["a"]))
    rows = []
    for window in windows:
        cells = [_length_cell(run.results["length"]["a"], "window", window) for run in runs]
        rows.append([f"{window:,}", *cells])
    caption = (
        "Definition A: perplexity of the last tokens [95 % interval], n windows. The same tokens "
        "are scored at every W, so changes along a column are much surer than its intervals."
    )
    columns = ["W", *beside("perplexity", runs)]
    if alone(runs) and rows:
        caption += (
            f" The change is in nats per token from W = {windows[0]:,}, ± one standard error."
        )
        columns.append("change")
        for row, point in zip(rows, section["a"], strict=True):
            change = point["change"]
            row.append("–" if change is None else f"{change:+.4f} ± {point['change_stderr']:.4f}")
    if rows:
        blocks.append(Table(columns, rows, caption))
    if plot := _length_plot(runs):
        blocks.append(plot)
    starts = dict.fromkeys(p["start"] for run in runs for p in run.results["length"]["b"])
    rows = [
        [f"{start:,}", *(_length_cell(run.results["length"]["b"], "start", start) for run in runs)]
        for start in starts
    ]
    if rows:
        columns = ["from position", *beside("perplexity", runs)]
        blocks.append(Table(columns, rows, "Definition B, every range", detail=True))
    failed = [
        [run.name, part.upper(), f"{p['window' if part == 'a' else 'start']:,}", p["reason"]]
        for run in runs
        for part in ("a", "b")
        for p in run.results["length"][part]
        if p["perplexity"] is None
    ]
    if failed:
        blocks.append(Table(("run", "definition", "length", "why"), failed, "Not measured."))
    return blocks


def _length_plot(runs: Sequence[Run]) -> Plot | None:
    parts = [
        part
        for part in ("a", "b")
        if any(p["perplexity"] for run in runs for p in run.results["length"][part])
    ]
    if not parts:
        return None
    figure, panels = new_figure(7.2, 3.4, columns=len(parts))
    labels = {"a": ("window", "context length W"), "b": ("end", "position")}
    for axes, part in zip(panels, parts, strict=True):
        key, label = labels[part]
        for i, run in enumerate(runs):
            points = [p for p in run.results["length"][part] if p["perplexity"] is not None]
            low = [math.exp(p["nats"] - 1.96 * p["stderr"]) for p in points]
            high = [math.exp(p["nats"] + 1.96 * p["stderr"]) for p in points]
            values = [p["perplexity"] for p in points]
            line(axes, i, run.name, [p[key] for p in points], values, low, high)
        mark = _shared_length(runs)
        name = f"definition {part.upper()}"
        finish(axes, label, "perplexity", log_x=True, title=name, training_length=mark)
        values = [v for drawn in axes.lines for v in _finite(drawn.get_ydata())]
        if max(values) > 10 * min(values):
            axes.set_yscale("log")
    caption = "Perplexity against length, with 95 % intervals. Lower is better."
    return Plot("length", figure, caption)


def _finite(values: Any) -> list[float]:
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def _length_cell(points: Sequence[dict[str, Any]], key: str, value: int) -> str | Cell:
    point = next((p for p in points if p[key] == value), None)
    if point is None:
        return ""
    if point["perplexity"] is None:
        return Cell("not measured", note=point["reason"])
    return _interval(point)


def _interval(point: dict[str, Any]) -> str:
    low, high = (math.exp(point["nats"] + sign * 1.96 * point["stderr"]) for sign in (-1, 1))
    spec = ".2f" if high < 1000 else ",.0f"
    return f"{point['perplexity']:{spec}} [{low:{spec}}, {high:{spec}}] n={point['n']}"


# --- zero-shot tasks --------------------------------------------------------------------------


def zero_shot_blocks(runs: Sequence[Run]) -> list[Block]:
    """Scores of the harness' tasks, and published ones beside them."""
    section = runs[0].results["lm_eval"]
    limited = "" if section["limit"] is None else f", only the first {section['limit']} questions"
    blocks: list[Block] = [
        Heading("Zero-shot tasks"),
        Text(
            "lm-evaluation-harness' own prompts and metrics, no examples in the prompt"
            f"{limited}. acc_norm divides log-likelihoods by the length of the answer in "
            "characters; perplexity is per last word."
        ),
    ]
    keys = dict.fromkeys(
        (name, metric)
        for run in runs
        for name, task in run.results["lm_eval"]["tasks"].items()
        for metric in (
            *task["reported"],
            *(m for m in task["metrics"] if m not in task["reported"]),
        )
    )
    rows: list[list[str | Cell]] = []
    for name, metric in keys:
        cells: list[str | Cell] = []
        reported, n = False, ""
        for run in runs:
            task = run.results["lm_eval"]["tasks"].get(name)
            if task is None or metric not in task["metrics"]:
                cells.append("")
                continue
            score = task["metrics"][metric]
            reported = metric in task["reported"]
            n = f"{task['n']:,}"
            cells.append(_score_text(score))
        rows.append([name, metric, *cells, n, "yes" if reported else ""])
    for average in dict.fromkeys(k for run in runs for k in run.results["lm_eval"]["averages"]):
        values = [run.results["lm_eval"]["averages"].get(average) for run in runs]
        cells = ["" if score is None else _score_text(score) for score in values]
        rows.append([f"average: {average}", "", *cells, "", "yes"])
    columns = ["task", "metric", *beside("value ± stderr", runs), "n", "in papers"]
    caption = (
        "± is one standard error, as the harness computes it; a 95 % interval is about two of "
        "them to each side; that of an average takes its tasks as independent. Averages are named "
        "after the paper that uses them: Mamba's has no OpenBookQA, Mamba-2's takes its acc_norm, "
        "Mamba-3's its acc; BoolQ is in none."
    )
    blocks.append(Table(columns, rows, caption))
    for run in runs:
        blocks += _published_blocks(run, several=not alone(runs))
    files = {
        (name, task["file"] or "Hugging Face Hub", task["sha256"] or "–")
        for run in runs
        for name, task in run.results["lm_eval"]["tasks"].items()
    }
    data = Table(("task", "data", "SHA-256"), sorted(files), "Data of the tasks", detail=True)
    return [*blocks, data]


def _score_text(score: dict[str, Any]) -> str:
    # Perplexities of weak models are huge.
    spec = ".4f" if score["value"] < 1000 else ".3e"
    value = number(score["value"], spec)
    return value if score["stderr"] is None else f"{value} ± {number(score['stderr'], spec)}"


def _published_blocks(run: Run, *, several: bool) -> list[Block]:
    published = run.results["lm_eval"]["published"]
    if published is None:
        return []
    rows: list[list[str | Cell]] = [
        [
            score["name"],
            score["metric"],
            f"{score['value']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] else ""),
            f"{score['published']:.2f}",
            f"{score['difference']:+.2f}",
            Cell("differs", 0.0) if score["flag"] else Cell("agrees", 1.0),
        ]
        for score in (*published["scores"], *published["averages"])
    ]
    source = published["source"]
    note = f" {published['note']}" if published["note"] else ""
    caption = (
        f"[{source['title']}]({source['url']}): {source['training']}.{note} A difference stands "
        "out beyond two standard errors and 0.5 points (perplexity: 2 %)."
    )
    columns = ("task", "metric", "here", "published", "difference", "")
    title = f"Beside the published scores of {published['model']}"
    return [
        Heading(f"{title}: {run.name}" if several else title, 3),
        Table(columns, rows, caption),
    ]


# --- efficiency -------------------------------------------------------------------------------


def efficiency_blocks(runs: Sequence[Run]) -> list[Block]:
    """Speed and memory at every length."""
    section = runs[0].results["efficiency"]
    blocks: list[Block] = [
        Heading("Efficiency"),
        Text(
            f"Medians of {section['repeats']} timed runs after {section['warmup']} for warming up, "
            "the device synchronised before and after each. Prefill is one forward pass over a "
            "prompt of that length, time to first token a call of `generate` for one token; "
            f"decoding is `generate` for {section['new_tokens']} tokens on a cache of that length. "
            f"Device: {runs[0].results['header']['device']}, {section['dtype']}."
        ),
    ]
    for run in runs:
        if not alone(runs):
            blocks.append(Heading(run.name, 3))
        section = run.results["efficiency"]
        batches = section["batch_sizes"]
        rows = []
        for point in section["lengths"]:
            decode = [_speed_cell(point["decode"][str(batch)], "tokens_per_s") for batch in batches]
            prefill = point["prefill"]
            rows.append(
                [
                    f"{point['length']:,}",
                    _speed_cell(prefill, "tokens_per_s"),
                    _speed_cell(point["first_token"], "seconds", 1e3, ".1f"),
                    *decode,
                    _memory(prefill.get("peak_bytes")),
                    _memory(prefill.get("cache_bytes")),
                ]
            )
        columns = ["tokens", "prefill tok/s", "first token, ms"]
        columns += [f"decode tok/s, batch {batch}" for batch in batches]
        columns += ["peak memory", "cache"]
        caption = (
            "Decoding speed counts the tokens of all sequences of the batch. Peak memory is that "
            "of the prefill with the weights; cache is that of one sequence. The range of the "
            "timed runs shows when you point at a number."
        )
        blocks.append(Table(columns, rows, caption))
    blocks.append(_efficiency_plot(runs))
    return blocks


def _speed_cell(value: dict[str, Any], key: str, scale: float = 1.0, spec: str = ",.0f") -> Cell:
    if value.get(key) is None:
        return Cell("–", note=value["reason"])
    low, high = (scale * bound for bound in value["range"])
    note = f"{low:{spec}} to {high:{spec}} in {value['n']} runs"
    return Cell(f"{scale * value[key]:{spec}}", note=note)


def _memory(size: int | None) -> str:
    if size is None:
        return "–"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size} B"


def _efficiency_plot(runs: Sequence[Run]) -> Plot:
    figure, panels = new_figure(7.2, 3.2, columns=2)
    batch = max(runs[0].results["efficiency"]["batch_sizes"])
    for i, run in enumerate(runs):
        lengths = run.results["efficiency"]["lengths"]
        for axes, pick in ((panels[0], "prefill"), (panels[1], "decode")):
            points = [
                (p["length"], p[pick] if pick == "prefill" else p[pick].get(str(batch), {}))
                for p in lengths
            ]
            known = [(x, y["tokens_per_s"]) for x, y in points if y.get("tokens_per_s")]
            line(axes, i, run.name, [x for x, _ in known], [y for _, y in known])
    finish(panels[0], "prompt tokens", "tokens per second", log_x=True, title="prefill, batch 1")
    finish(panels[1], "tokens in the cache", "", log_x=True, title=f"decoding, batch {batch}")
    for axes in panels:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    ticks = ", ".join(short_length(p["length"]) for p in runs[0].results["efficiency"]["lengths"])
    return Plot("efficiency", figure, f"Tokens per second at {ticks} tokens; higher is better.")


# --- consistency ------------------------------------------------------------------------------


def consistency_blocks(runs: Sequence[Run]) -> list[Block]:
    """Whether a model answers alike however it is asked."""
    names = dict.fromkeys(
        c["name"] for run in runs for c in run.results["consistency"]["comparisons"]
    )
    rows: list[list[str | Cell]] = []
    for name in names:
        cells: list[str | Cell] = []
        for run in runs:
            every = run.results["consistency"]["comparisons"]
            c = next(c for c in every if c["name"] == name)
            note = f"n = {c['tokens']:,} tokens, allowed {c['tolerance']:g}"
            cells.append(Cell(f"{c['difference']:.1e}", 1.0 if c["passed"] else 0.0, note))
        rows.append([name, *cells])
    generations = [run.results["consistency"]["generation"] for run in runs]
    equal = [
        Cell(f"{g['equal']} of {g['prompts']} equal", g["equal"] / g["prompts"])
        for g in generations
    ]
    rows.append(["greedy continuations, batch against single", *equal])
    section = runs[0].results["consistency"]
    caption = (
        f"Largest difference in nats of a token's log-probability from that of one whole pass, "
        f"over {section['samples']} sequences; tinted where it is more than rounding "
        f"({section['comparisons'][0]['tolerance']:g} nats) explains. Continuations may part by "
        "rounding alone where two tokens are equally likely."
    )
    return [Heading("Consistency"), Table(["", *beside("difference", runs)], rows, caption)]


# --- samples ----------------------------------------------------------------------------------


def sample_blocks(runs: Sequence[Run]) -> list[Block]:
    """Continuations of prompts, as the model wrote them."""
    blocks: list[Block] = [Heading("Samples")]
    for run in runs:
        section = run.results["generate"]
        if not alone(runs):
            blocks.append(Heading(run.name, 3))
        blocks.append(Text(_sampling(section)))
        for sample in section["samples"]:
            blocks.append(Text(f"Prompt `{sample['prompt']!r}`, {sample['tokens']} new tokens:"))
            blocks.append(Verbatim(sample["prompt"] + sample["text"]))
    return blocks


def _sampling(section: dict[str, Any]) -> str:
    if not section["do_sample"]:
        return "Greedy: always the likeliest token."
    return (
        f"Sampled with temperature {section['temperature']}, top_k {section['top_k'] or 'off'}, "
        f"top_p {section['top_p']}, seed {section['seed']}. Not chosen among several."
    )
