"""The sections of a suite: what each runs, and what it leaves in the results.

Another kind of evaluation is another options class in eval/suite.py and another function here.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from eval.documents import read_documents, sha256
from eval.generate import generate_samples
from eval.harness import run_lm_eval
from eval.model import LoadedModel
from eval.ngram import SEPARATOR, ByteNgram, bits_per_byte, read_seen_tokens
from eval.perplexity import file_perplexity
from eval.report import Results
from eval.suite import GenerateOptions, LmEvalOptions, NgramOptions, PerplexityOptions, Suite


def run_perplexity(
    loaded: LoadedModel, options: PerplexityOptions, suite: Suite, results: Results
) -> dict[str, Any]:
    how = {name: getattr(options, name) for name in ("window", "stateful", "batch_size")}
    files = [
        file_perplexity(loaded, file, read_documents(file, options.max_bytes), **how)
        for file in options.files
    ]
    return {**how, "max_bytes": options.max_bytes, "files": files}


def run_ngram(
    loaded: LoadedModel, options: NgramOptions, suite: Suite, results: Results
) -> dict[str, Any]:
    probe = "".join(map(chr, range(0x800)))  # all characters of one and two bytes
    if loaded.encode(probe)[len(loaded.prefix) :] != list(probe.encode("utf-8")):
        raise ValueError(
            "section ngram needs a model whose token ids 0..255 are the bytes of the text, but its "
            f"tokenizer gives 'abc' the ids {loaded.encode('abc')}, expected {list(b'abc')} after "
            "the prefix"
        )
    tokens = read_seen_tokens(options.seen_tokens)
    ngram = ByteNgram(tokens, max(options.orders))
    files = []
    for score in results["perplexity"]["files"]:
        documents = read_documents(score["file"], results["perplexity"]["max_bytes"])
        texts = [document.text for document in documents]
        bits = bits_per_byte(ngram, texts, options.orders, skip_first=not loaded.prefix)
        # JSON has text keys only.
        files.append({"file": score["file"], "bits_per_byte": {str(k): v for k, v in bits.items()}})
        required = options.require_better_than_order
        if required is not None:
            results["checks"].append(
                {
                    "name": f"{score['file']}: fewer bits per byte than order {required}",
                    "passed": score["bits_per_byte"] < bits[required],
                    "detail": f"{score['bits_per_byte']:.4f} against {bits[required]:.4f}",
                }
            )
    return {
        "seen_tokens": options.seen_tokens,
        "sha256": sha256(options.seen_tokens),
        "tokens": len(tokens),
        "bytes": int((tokens < SEPARATOR).sum()),
        "files": files,
    }


def run_zero_shot(
    loaded: LoadedModel, options: LmEvalOptions, suite: Suite, results: Results
) -> dict[str, Any]:
    section = run_lm_eval(loaded, options, suite.seed)
    for task in section["tasks"].values():
        task["sha256"] = sha256(task["file"]) if task["file"] else None
    return section


def run_generate(
    loaded: LoadedModel, options: GenerateOptions, suite: Suite, results: Results
) -> dict[str, Any]:
    samples = generate_samples(loaded, options, suite.seed)
    return {**asdict(options), "seed": suite.seed, "samples": samples}


# In order of execution: a section may use the results of those before it.
SECTIONS: dict[str, Callable[[LoadedModel, Any, Suite, Results], dict[str, Any]]] = {
    "perplexity": run_perplexity,
    "ngram": run_ngram,
    "lm_eval": run_zero_shot,
    "generate": run_generate,
}
