"""Evaluate one model on one suite: `python -m eval.run --model DIR --suite FILE [--output DIR]`.

Any value of the suite can be overridden with `--section.key VALUE` (see eval/suite.py).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ssm_hf
from eval.documents import read_documents
from eval.model import describe_environment, describe_model, load_model
from eval.ngram import read_seen_tokens
from eval.report import Results, summary, write_report
from eval.sections import SECTIONS
from eval.suite import Suite, load_suite
from eval.tasks.zero_shot import check_tasks


def check_inputs(suite: Suite) -> None:
    """Read or look for every input file, so that a wrong path costs no minutes of scoring."""
    if suite.perplexity is not None:
        for file in suite.perplexity.files:
            read_documents(file, suite.perplexity.max_bytes)
    if suite.ngram is not None:
        read_seen_tokens(suite.ngram.seen_tokens)
    if suite.lm_eval is not None:
        check_tasks(suite.lm_eval.tasks)


def evaluate(model: str, suite: Suite, suite_file: str) -> Results:
    """Load a model, run every section of the suite, and return the results as JSON values."""
    begin = time.perf_counter()
    check_inputs(suite)
    loaded = load_model(model, dtype=suite.dtype, device=suite.device, prefix=suite.prefix)
    header: dict[str, Any] = {
        "model": describe_model(model, loaded),
        "suite_file": suite_file,
        "suite": suite.as_dict(),
        "seed": suite.seed,
        **describe_environment(loaded.model.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": {"load": time.perf_counter() - begin},
    }
    results: Results = {"header": header, "checks": []}
    for name, run in SECTIONS.items():
        options = getattr(suite, name)
        if options is not None:
            start = time.perf_counter()
            results[name] = run(loaded, options, suite, results)
            header["seconds"][name] = time.perf_counter() - start
    header["seconds"]["total"] = time.perf_counter() - begin
    return results


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split ["--a", "1", "--b=2"] into [("a", "1"), ("b", "2")].

    Raises:
        ValueError: a value without a key, or a key without a value.
    """
    overrides = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        following = value if equals else next(rest, None)
        if not argument.startswith("--") or following is None:
            raise ValueError(f"expected --section.key VALUE, got {argument!r}")
        overrides.append((key, following))
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 1 when a check of the suite failed."""
    ssm_hf.register(override=True)
    parser = argparse.ArgumentParser(prog="python -m eval.run", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model directory or Hugging Face Hub name")
    parser.add_argument("--suite", required=True, help="YAML file, see configs/eval")
    parser.add_argument("--output", help="default: runs/eval/<model folders>-<suite>")
    options, rest = parser.parse_known_args(arguments)
    try:
        overrides = parse_overrides(rest)
    except ValueError as error:
        parser.error(str(error))
    suite = load_suite(options.suite, overrides)
    results = evaluate(options.model, suite, options.suite)
    # Two parts, because most runs call their last one "final".
    name = "-".join([*Path(options.model).absolute().parts[-2:], Path(options.suite).stem])
    files = write_report(results, options.output or Path("runs/eval") / name)
    print(summary(results, files))
    return 0 if all(check["passed"] for check in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
