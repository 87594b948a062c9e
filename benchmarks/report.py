"""Makes docs/performance.md and its plots from benchmarks/results/*.jsonl.

    python -m benchmarks.report

Every number in the page comes from a line of a results file, every target from
benchmarks/targets.json; docs/performance_notes.md, written by hand, is included at the end. Of
several runs the last line of a case counts, and its peers are those of the same GPU.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from benchmarks import common

DOCS = common.ROOT / "docs"
PLOTS = DOCS / "performance"
Record = dict[str, Any]
PASSES = (("fwd", "forward", "fwd_ms"), ("fwdbwd", "forward + backward", "fwdbwd_ms"))


def load() -> dict[str, list[Record]]:
    """Records of all results files by benchmark, in the order they were written."""
    found: dict[str, list[Record]] = {}
    for path in sorted(common.RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "case" in record:
                found.setdefault(record["benchmark"], []).append(record)
    return found


def latest(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """{case: {provider: record}}, the last of each, peers on the GPU of our own last record.

    A provider that was run in several ways ("eager", "graph", ...) appears once for each.
    """
    by_case: dict[str, dict[str, Record]] = {}
    ours: dict[str, str] = {}
    kept = list(records)
    for r in kept:
        if r["provider"] == "ssm_hf":
            ours[r["case"]] = r["device"]["name"]
    for r in kept:
        if r["device"]["name"] == ours.get(r["case"], r["device"]["name"]):
            label = f"{r['provider']}, {r['way']}" if "way" in r else r["provider"]
            by_case.setdefault(r["case"], {})[label] = r
    return by_case


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def slower_memory(record: Record, key: str, targets: Record) -> float:
    """How much longer the targets' GPU would take, were its memory as slow as in this run.

    Aims and tabled times belong to one GPU. Where memory is the limit that binds they move with the
    copy bandwidth; where products or exponentials bind they stay, as both GPUs have the same
    multiprocessors.
    """
    limits = record["limits_ms"][key]
    if record["device"]["name"] == targets["device"]["name"] or limits["memory"] < max(
        limits.values()
    ):
        return 1.0
    return targets["device"]["copy_tb_s"] / record["ceilings"]["copy_tb_s"]


def _best_peer(found: dict[str, Record], key: str) -> tuple[str, float] | None:
    times = [
        (r["values"][f"{key}_device_ms"], name)
        for name, r in found.items()
        if name != "ssm_hf" and f"{key}_device_ms" in r["values"]
    ]
    return (min(times)[1], min(times)[0]) if times else None


def operator_targets(cases: dict[str, dict[str, Record]], targets: Record) -> str:
    """Every listed shape: ours, the peer of the same run, the aim, reached or not."""
    rows = []
    for row in targets["operators"]:
        found = cases.get(row["id"], {})
        ours = found.get("ssm_hf")
        for key, title, tabled in PASSES:
            if row["aim"][tabled] is None:
                continue
            if ours is None or f"{key}_device_ms" not in ours["values"]:
                why = ours.get("reason", "not run") if ours else "not run"
                rows.append([row["title"], title, why, *["–"] * 7])
                continue
            mine, wall = ours["values"][f"{key}_device_ms"], ours["values"][f"{key}_wall_ms"]
            aim = row["aim"][tabled] * slower_memory(ours, key, targets)
            peer = _best_peer(found, key)
            peer_tabled = row["peer"][tabled]
            if peer is None and peer_tabled is not None:
                peer = ("tabled", peer_tabled * slower_memory(ours, key, targets))
            ratio = None if peer is None else peer[1] / mine
            limit = max(ours["limits_ms"][key].values())
            rows.append([
                row["title"], title, number(mine), number(wall), number(aim),
                "yes" if mine <= aim else "no",
                "–" if peer is None else f"{number(peer[1])} ({peer[0]})", number(peer_tabled),
                "–" if ratio is None else f"{ratio:.1f}×", f"{limit / mine:.0%}",
            ])  # fmt: skip
    head = [
        "operator", "pass", "device ms", "wall ms", "aim", "reached", "peer, device ms",
        "peer's tabled ms (H200)", "peer / ours", "of the limit",
    ]  # fmt: skip
    return table(head, rows)


def other_cases(cases: dict[str, dict[str, Record]], listed: set[str]) -> tuple[str, str]:
    """Shapes that nothing was tuned on, and the worst ratio to a peer among all shapes."""
    rows, ratios = [], []
    for name, found in cases.items():
        ours = found.get("ssm_hf")
        if ours is None or not ours["values"]:
            continue
        for key, title, _ in PASSES:
            if f"{key}_device_ms" not in ours["values"]:
                continue
            mine, peer = ours["values"][f"{key}_device_ms"], _best_peer(found, key)
            if peer:
                ratios.append((peer[1] / mine, name, title, peer[0]))
            if name in listed or name.startswith("length-"):
                continue
            shape = " ".join(f"{k}{v}" for k, v in ours["shape"].items())
            limit = max(ours["limits_ms"][key].values())
            rows.append([
                name, f"{shape} {ours['dtype']}", title, number(mine),
                "–" if peer is None else f"{number(peer[1])} ({peer[0]})",
                "–" if peer is None else f"{peer[1] / mine:.1f}×", f"{limit / mine:.0%}",
            ])  # fmt: skip
    worst = "No peer was timed."
    if ratios:
        ratio, name, title, peer = min(ratios)
        worst = (
            f"Worst ratio to a peer over all {len(ratios)} comparisons: {ratio:.2f}× "
            f"({name}, {title}, beside {peer})."
        )
    head = ["case", "shape", "pass", "device ms", "best peer", "peer / ours", "of the limit"]
    return table(head, rows), worst


def model_targets(records: dict[str, list[Record]], targets: Record) -> str:
    """Training, generation, prefill, memory and start-up against their aims."""
    everything = [r for name, rs in records.items() if name != "ops" for r in rs]
    rows = []
    for row in targets["models"]:
        measure, higher = row["measure"], row["better"] == "higher"
        values: dict[bool, dict[str, float]] = {True: {}, False: {}}
        # Not every run measured everything.
        having = latest(r for r in everything if measure in r["values"])
        found = having.get(row.get("case", row["id"]), {})
        for label, r in found.items():
            values[r["provider"].startswith("ssm_hf")][label] = r["values"][measure]
        best = {
            side: (max if higher else min)(v, key=lambda k: v[k]) if v else None
            for side, v in values.items()
        }
        mine = None if best[True] is None else values[True][best[True]]
        theirs = None if best[False] is None else values[False][best[False]]
        aim, star = row["aim"], ""
        if aim is not None and best[True] is not None and row["bound"] == "memory":
            factor = targets["device"]["copy_tb_s"] / found[best[True]]["ceilings"]["copy_tb_s"]
            if abs(factor - 1) > 0.05:
                aim, star = aim * factor, "*"
        gain = None
        if mine is not None and theirs is not None:
            gain = mine / theirs if higher else theirs / mine
        reached = "–"
        if mine is not None and aim is not None:
            reached = "yes" if (mine >= aim if higher else mine <= aim) else "no"
        rows.append([
            row["title"], measure, _labelled(mine, best[True]), number(aim) + star, reached,
            _labelled(theirs, best[False]),
            "–" if row["peer_value"] is None else f"{number(row['peer_value'])} ({row['peer']})",
            "–" if gain is None else f"{gain:.1f}×",
        ])  # fmt: skip
    head = ["job", "measure", "ours", "aim", "reached", "best peer, same GPU",
            "peer, tabled (H200)", "gain"]  # fmt: skip
    return table(head, rows)


def _labelled(value: float | None, label: str | None) -> str:
    name = (label or "").removeprefix("ssm_hf").removeprefix(", ")
    return number(value) + (f" ({name})" if value is not None and name else "")


def everything_else(records: dict[str, list[Record]]) -> str:
    """Every result on models, as it was written."""
    rows = []
    for benchmark, found in records.items():
        if benchmark in ("ops", "correctness"):
            continue
        for case, by_provider in latest(found).items():
            for provider, r in by_provider.items():
                values = ", ".join(
                    f"{k} {number(v) if isinstance(v, int | float) else v}"
                    for k, v in r["values"].items()
                )
                rows.append([benchmark, case, provider, values or r.get("reason", "–")])
    return table(["benchmark", "case", "provider", "values"], rows) if rows else ""


def correctness(records: list[Record]) -> str:
    """The last summary of tests/ops/grid.py for each operator."""
    rows = []
    for case, found in latest(records).items():
        v = found["ssm_hf"]["values"]
        largest = v["largest_error_over_bound"]
        rows.append([
            case, str(v["rows"]), str(len(v["not_run"])), str(len(v["failures"])),
            f"{v['largest_fp32_error']:.1e}", f"{largest['float32']:.2f}",
            f"{largest['bfloat16']:.2f}", found["ssm_hf"]["device"]["name"],
        ])  # fmt: skip
    head = ["operator", "rows", "not reached", "failures", "largest fp32 error",
            "fp32 error / bound", "bf16 error / bound", "GPU"]  # fmt: skip
    return table(head, rows)


def plots(cases: dict[str, dict[str, Record]], targets: Record) -> list[str]:
    """Time against length, and the share of the limit at the listed shapes; their file names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PLOTS.mkdir(exist_ok=True)
    made = []
    for kind, title in (("ssd", "SSD"), ("scan", "selective scan")):
        figure, axes = plt.subplots(figsize=(6, 4))
        lines: dict[str, list[tuple[int, float]]] = {}
        for name, found in cases.items():
            if name.startswith(f"length-{kind}-"):
                for provider, r in found.items():
                    for key, label, _ in PASSES:
                        if f"{key}_device_ms" in r["values"]:
                            point = (r["shape"]["T"], r["values"][f"{key}_device_ms"])
                            lines.setdefault(f"{provider}, {label}", []).append(point)
        if not lines:
            plt.close(figure)
            continue
        for label, points in sorted(lines.items()):
            style = "-" if label.startswith("ssm_hf") else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens, one row", ylabel="device ms")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{title}: time against length")
        axes.legend()
        axes.grid(alpha=0.3)
        made.append(_save(figure, f"length-{kind}.svg"))
        plt.close(figure)
    names, shares, theirs = [], [], []
    for row in targets["operators"]:
        found = cases.get(row["id"], {})
        for key, label, _ in PASSES:
            ours = found.get("ssm_hf", {"values": {}})
            if f"{key}_device_ms" not in ours["values"]:
                continue
            limit, peer = max(ours["limits_ms"][key].values()), _best_peer(found, key)
            names.append(f"{row['title']}, {label}")
            shares.append(100 * limit / ours["values"][f"{key}_device_ms"])
            theirs.append(100 * limit / peer[1] if peer else 0)
    if names:
        figure, axes = plt.subplots(figsize=(8, 0.35 * len(names) + 1))
        places = range(len(names))
        axes.barh([p - 0.2 for p in places], shares, 0.4, label="ssm_hf")
        axes.barh([p + 0.2 for p in places], theirs, 0.4, label="best peer", color="0.7")
        axes.set_yticks(list(places), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="% of what memory, matrix units and exponentials allow", xlim=(0, 100))
        axes.legend(fontsize=7)
        made.append(_save(figure, "limits.svg"))
        plt.close(figure)
    return made


def _save(figure: Any, name: str) -> str:
    figure.tight_layout()
    # No date and no random ids: the file changes only when the numbers do.
    figure.savefig(PLOTS / name, metadata={"Date": None})
    return f"performance/{name}"


def page() -> str:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "ssm_hf"
    targets = json.loads((common.ROOT / "benchmarks" / "targets.json").read_text())
    records = load()
    cases = latest(records.get("ops", []))
    listed = {row["id"] for row in targets["operators"]}
    runs = {
        (r["device"]["name"], r["commit"], r["command"], json.dumps(r["versions"], sort_keys=True),
         json.dumps(r.get("ceilings", {}), sort_keys=True), r["date"])
        for rs in records.values() for r in rs
    }  # fmt: skip
    devices = sorted(
        [
            device, commit, f"`{command}`",
            ", ".join(f"{k} {v:g}" for k, v in json.loads(ceilings).items()) or "–", date,
        ]
        for device, commit, command, _, ceilings, date in runs
    )  # fmt: skip
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in json.loads(run[3]).items()) for run in runs}
    )
    grid, worst = other_cases(cases, listed)
    figures = "\n".join(f"![{name}]({name})\n" for name in plots(cases, targets))
    notes = DOCS / "performance_notes.md"
    return f"""# Performance

Made by `python -m benchmarks.report` from `benchmarks/results/`; the notes at the end are written
by hand.

Device time is a CUDA graph of the call, replayed; wall time lies between CUDA events around one
call and counts the host where it is slower. Both are medians. Inputs are random, bf16 unless said
otherwise, with fp32 A, D and dt_bias. Outputs and gradients are checked against the torch path in
fp32 or wider before a time is taken. The limit is the largest of three times: the least bytes at
the copy bandwidth, the products at the matmul rate (both measured in the same run), the
exponentials at 16 a clock and multiprocessor. The peers' kernels come from their own autotuners,
whose search is shortened (a few milliseconds a candidate); their times are device times too, so
that a slow host is no victory.

{table(["GPU", "commit", "command", "ceilings", "date"], devices)}
Versions: {"; ".join(versions)}.

## Operators at the listed shapes

Aims and tabled times belong to an H200. On another GPU those of operators that are bound by memory
are rescaled by the copy bandwidth measured in the run. A peer that could not be run beside ours is
compared by its tabled time, rescaled in the same way.

{operator_targets(cases, targets)}
## Operators at shapes that nothing was tuned on

{worst}

{grid}
{figures}
## Models

{model_targets(records, targets)}
An aim with a star is bound by memory and rescaled by the copy bandwidth of the run.
States in bf16 are what mamba_ssm keeps; without the word ours are in fp32.

{everything_else(records)}
## Correctness on the GPU

The pairwise list of `tests/ops/grid.json` and one row of 70,000 tokens, forward and all gradients,
against fp64 (`python -m tests.ops.grid`, which states the bounds).

{correctness(records.get("correctness", []))}
{notes.read_text() if notes.exists() else ""}"""


def main() -> None:
    (DOCS / "performance.md").write_text(page())


if __name__ == "__main__":
    main()
