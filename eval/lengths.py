"""Perplexity against length, by both definitions in use.

A: the last `last` tokens of a window of W tokens, ppl = exp(mean). The windows of all W end at the
   same places of a document, so the same tokens are scored with more or less context before them.
B: one long block of a document, the mean loss of each range of `bucket` positions.

The state is carried from one forward pass to the next, so memory grows only as the model's own
cache does. A length that the model cannot do in the memory or the time there is becomes a null with
its reason.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.documents import read_documents, sha256
from eval.limits import Clock, NotPossible, arguments, attempt, check_positions
from eval.model import LoadedModel
from eval.options import LengthOptions
from eval.parallel import finish, processes
from eval.samples import SampleStore


@torch.no_grad()
def tail_nats(
    model: PreTrainedModel, ids: Sequence[int], last: int, chunk: int, clock: Clock
) -> np.ndarray:
    """Return -log p of the last tokens of a sequence, each given all before it.

    Args:
        model: causal language model in eval mode.
        ids: n tokens; the first is not scored.
        last: how many, at most n - 1.
        chunk: tokens per forward pass.
        clock: asked after each.

    Returns:
        (last,) float32.
    """
    inputs = torch.tensor([ids[:-1]], dtype=torch.long, device=model.device)
    targets = torch.tensor(ids[1:], dtype=torch.long, device=model.device)
    n = inputs.shape[1]
    first = n - last  # the first input whose prediction counts
    # Passes that score nothing need no logits, which are most of the memory of a long pass.
    few = {"logits_to_keep": 1} if "logits_to_keep" in arguments(model) else {}
    carried: dict[str, Any] = {"use_cache": True}
    nats = []
    cuts = sorted({*range(0, first, chunk), *range(first, n, chunk), n})
    for start, end in pairwise(cuts):
        scored = start >= first
        output = model(input_ids=inputs[:, start:end], **carried, **({} if scored else few))
        if end < n and output.past_key_values is None:
            raise NotPossible("the model returns no cache to go on from")
        carried["past_key_values"] = output.past_key_values
        if scored:
            logits = output.logits[0].float()
            nats.append(F.cross_entropy(logits, targets[start:end], reduction="none").cpu())
        clock.check()
    return torch.cat(nats).numpy()


def window_ends(tokens: int, longest: int, places: int) -> list[int]:
    """Return where windows end: `places` ends, evenly from `longest` to the end of the document."""
    if places == 1 or tokens == longest:
        return [tokens]
    step = (tokens - longest) / (places - 1)
    return sorted({round(longest + i * step) for i in range(places)})


class _Documents:
    """The tokens of the documents that are long enough for all that is measured.

    `reachable` is the longest window or block that any document has tokens for. All points of a
    curve come from the same documents, or it would show their differences.
    """

    def __init__(self, loaded: LoadedModel, options: LengthOptions) -> None:
        names: list[str] = []
        texts: list[list[int]] = []
        for file in options.files:
            documents = read_documents(file)
            names += [f"{file}: {document.name}" for document in documents]
            # The prefix stands at the start of a window and not of a document.
            rows = loaded.encode_batch([document.text for document in documents])
            texts += [ids[len(loaded.prefix) :] for ids in rows]
        sizes = [*options.windows, *([options.block] if options.block else [])]
        longest = max(map(len, texts))
        self.reachable = max((size for size in sizes if size <= longest), default=0)
        fitting = [
            i for i, ids in enumerate(texts) if self.reachable and len(ids) >= self.reachable
        ]
        fitting = fitting[: options.documents]
        self.names = [names[i] for i in fitting]
        self.ids = [texts[i] for i in fitting]
        self.longest = max((w for w in options.windows if w <= self.reachable), default=0)


def run_length(loaded: LoadedModel, options: LengthOptions, store: SampleStore) -> dict[str, Any]:
    """Score windows and blocks.

    Args:
        loaded: the model; its prefix token begins every window and block.
        options: see `LengthOptions`.
        store: of finished windows and blocks.

    Returns:
        JSON values: `a` with one {"window", "perplexity", "nats", "stderr", "n", "reason",
        "change", "change_stderr"} per W, `b` with one {"start", "end", ...} per range;
        "perplexity" and "nats" are null, and "reason" says why, where the model or the documents
        could not do it. The standard error is that of the mean over windows, or over documents;
        "change" is the mean difference in nats from the shortest W, window by window.
    """
    documents = _Documents(loaded, options)
    prefix = list(loaded.prefix)
    tasks: dict[str, tuple[list[int], int]] = {}
    for window in sorted(w for w in options.windows if w <= documents.longest):
        for i, ids in enumerate(documents.ids):
            for end in window_ends(len(ids), documents.longest, options.places):
                part = prefix + ids[end - window + len(prefix) : end]
                tasks[f"a-{window}-{i}-{end}"] = (part, options.last)
    if options.block and options.block <= documents.reachable:
        for i, ids in enumerate(documents.ids):
            block = prefix + ids[: options.block]
            tasks[f"b-{options.block}-{i}"] = (block, len(block) - 1)
    failed: dict[str, tuple[int, str]] = {}

    def work(todo: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        bar = tqdm(todo, desc="length", unit="window", disable=not processes().is_main_process)
        for id in bar:
            kind, size = id.split("-")[:2]
            ids, last = tasks[id]
            try:
                if kind in failed and int(size) >= failed[kind][0]:
                    raise NotPossible(failed[kind][1])
                check_positions(loaded.model, len(ids))
                clock = Clock(options.max_seconds)
                nats = attempt(lambda: tail_nats(loaded.model, ids, last, options.chunk, clock))  # noqa: B023
            except NotPossible as reason:
                failed.setdefault(kind, (int(size), f"{reason} at {int(size):,} tokens"))
                yield id, {"failed": failed[kind][1]}
                continue
            if not np.isfinite(nats).all():
                raise ValueError(f"length: the losses of {id} are not finite")
            means = _bucket_means(nats, options.bucket) if kind == "b" else [float(nats.mean())]
            yield id, {"nats": means}

    samples = dict(zip(tasks, finish(store, list(tasks), work), strict=True))
    return {
        "last": options.last,
        "places": options.places,
        "block": options.block,
        "bucket": options.bucket,
        "chunk": options.chunk,
        "documents": [
            {"name": name, "tokens": len(ids)}
            for name, ids in zip(documents.names, documents.ids, strict=True)
        ],
        "files": [{"file": file, "sha256": sha256(file)} for file in options.files],
        "a": _window_points(samples, options),
        "b": _block_points(samples, options) if options.block else [],
    }


def _bucket_means(nats: np.ndarray, bucket: int) -> list[float]:
    """Average over whole ranges; a rest that is shorter is left out."""
    whole = len(nats) // bucket * bucket
    return nats[:whole].astype(np.float64).reshape(-1, bucket).mean(1).tolist()


def _point(values: Sequence[float], reason: str) -> dict[str, Any]:
    if not values:
        return {"perplexity": None, "nats": None, "stderr": None, "n": 0, "reason": reason}
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "perplexity": math.exp(mean) if mean < 700 else None,
        "nats": mean,
        "stderr": spread / math.sqrt(len(values)),
        "n": len(values),
        "reason": "beyond the range of numbers" if mean >= 700 else None,
    }


def _window_points(
    samples: dict[str, dict[str, Any]], options: LengthOptions
) -> list[dict[str, Any]]:
    points = []
    shortest: list[float] = []
    for window in sorted(options.windows):
        mine = [s for id, s in samples.items() if id.startswith(f"a-{window}-")]
        reasons = [s["failed"] for s in mine if "failed" in s]
        # A mean over those windows alone that a model happened to finish would be of other text.
        values = [] if reasons else [s["nats"][0] for s in mine]
        point = {"window": window, **_point(values, (reasons or ["no document is that long"])[0])}
        shortest = shortest or values
        # Window by window: the same tokens are scored at every length.
        change = _point([b - a for a, b in zip(shortest, values, strict=False)], "")
        points.append({**point, "change": change["nats"], "change_stderr": change["stderr"]})
    return points


def _block_points(
    samples: dict[str, dict[str, Any]], options: LengthOptions
) -> list[dict[str, Any]]:
    mine = [s for id, s in samples.items() if id.startswith(f"b-{options.block}-")]
    reasons = [s["failed"] for s in mine if "failed" in s]
    if reasons or not mine:
        reason = reasons[0] if reasons else "no document is that long"
        return [{"start": 0, "end": options.block, **_point([], reason)}]
    points = []
    for i in range(len(mine[0]["nats"])):
        at = {"start": i * options.bucket, "end": (i + 1) * options.bucket}
        points.append({**at, **_point([s["nats"][i] for s in mine], "")})
    return points
