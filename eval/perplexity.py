"""Likelihood of held-out documents: bits per byte, nats per token, perplexities.

Every token of a document is predicted exactly once, from the prefix token (if there is one) and
the tokens before it. The two modes differ in what the model remembers:

- stateful: the document is read in windows and the cache carries the state from one to the next,
  so each token is predicted from everything before it, in memory that does not grow for a
  recurrent model;
- windows: each window of at most `window` tokens starts from an empty state with one token of
  context; the last window of a document is moved back to full length, and what the window before
  it has scored is not scored again (the rolling windows of lm-evaluation-harness).

For documents of at most `window` tokens they are the same computation.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.documents import Document, sha256
from eval.model import LoadedModel
from eval.parallel import finish, processes
from eval.samples import SampleStore


class Segment(NamedTuple):
    """A stretch of one sequence that the model reads from an empty state.

    Inputs are `start .. end - 1`, each predicts its successor; predictions of inputs before
    `scored` are not counted.
    """

    sequence: int
    start: int
    end: int
    scored: int


class TokenScores(NamedTuple):
    """Negative log-likelihoods of one sequence's tokens but the first, all of shape (n - 1,).

    `nats` is float32; `position` is the number of tokens that the model had read since its state
    was empty, not counting the first.
    """

    nats: np.ndarray
    position: np.ndarray


def score_tokens(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    window: int,
    stateful: bool,
    batch_size: int,
    description: str = "scoring",
    bar: tqdm | None = None,
) -> list[TokenScores]:
    """Compute -log p(token | the tokens before it) of every token but each sequence's first.

    Args:
        model: causal language model in eval mode; stateful scoring of sequences longer than
            `window` needs one whose cache takes several tokens per call.
        sequences: token ids.
        window, stateful, batch_size: see `PerplexityOptions`.
        description: what is scored, for messages.
        bar: progress bar that counts tokens.

    Returns:
        One entry per sequence, in order.

    Raises:
        ValueError: the model gave a log-likelihood that is not finite.
    """
    scores = [
        TokenScores(np.zeros(max(n - 1, 0), np.float32), np.zeros(max(n - 1, 0), np.int64))
        for n in map(len, sequences)
    ]
    segments = [
        segment
        for i, sequence in enumerate(sequences)
        for segment in _segments(i, len(sequence) - 1, window, stateful)
    ]
    for batch in _batches(segments, batch_size):
        tokens = [sequences[s.sequence][s.start : s.end + 1] for s in batch]
        for segment, nats in zip(batch, _score_batch(model, tokens, window), strict=True):
            target = slice(segment.scored, segment.end)
            nats = nats[segment.scored - segment.start :]
            if not np.isfinite(nats).all():
                raise ValueError(
                    f"{description}: the log-likelihoods of sequence {segment.sequence} are "
                    "not finite"
                )
            scores[segment.sequence].nats[target] = nats
            scores[segment.sequence].position[target] = np.arange(
                segment.scored - segment.start, segment.end - segment.start
            )
            if bar is not None:
                bar.update(len(nats))
    return scores


def _segments(sequence: int, inputs: int, window: int, stateful: bool) -> list[Segment]:
    if stateful:
        return [Segment(sequence, 0, inputs, 0)] if inputs > 0 else []
    segments = []
    for scored in range(0, inputs, window):
        end = min(scored + window, inputs)
        segments.append(Segment(sequence, max(end - window, 0), end, scored))
    return segments


def _batches(segments: list[Segment], batch_size: int) -> list[list[Segment]]:
    """Group segments of similar length, longest first, so that less than half is padding."""
    batches: list[list[Segment]] = []
    longest = 0
    for segment in sorted(segments, key=lambda s: s.start - s.end):
        length = segment.end - segment.start
        if not batches or len(batches[-1]) == batch_size or 2 * length < longest:
            batches.append([])
            longest = length
        batches[-1].append(segment)
    return batches


@torch.no_grad()
def _score_batch(
    model: PreTrainedModel, tokens: list[Sequence[int]], window: int
) -> list[np.ndarray]:
    """Score token sequences (n_i,) that start from an empty state; returns (n_i - 1,) arrays.

    Padding is on the right: a causal model's real tokens never see it, so no mask is needed.
    """
    length = max(map(len, tokens)) - 1
    padded = torch.zeros(len(tokens), length + 1, dtype=torch.long)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    nats = np.zeros((len(tokens), length), np.float32)
    carried: dict[str, Any] = {"use_cache": length > window}
    for start in range(0, length, window):
        piece = padded[:, start : start + window + 1].to(model.device)
        output = model(input_ids=piece[:, :-1], **carried)
        if start + window < length:
            carried["past_key_values"] = output.past_key_values
        # Row by row: a float32 copy of all logits at once would double the memory.
        for row, logits in enumerate(output.logits):
            losses = F.cross_entropy(logits.float(), piece[row, 1:], reduction="none")
            nats[row, start : start + window] = losses.cpu().numpy()
    return [row[: len(ids) - 1] for row, ids in zip(nats, tokens, strict=True)]


def file_perplexity(
    loaded: LoadedModel,
    path: str,
    documents: Sequence[Document],
    *,
    window: int,
    stateful: bool,
    batch_size: int,
    samples: str | Path | None = None,
) -> dict[str, Any]:
    """Score the documents of one file.

    Args:
        loaded: the model.
        path: file the documents were read from, for the record.
        documents: texts; bytes are counted in UTF-8, words are separated by white space.
        window, stateful, batch_size: see `PerplexityOptions`.
        samples: folder of finished documents, which several processes share; None keeps nothing.

    Returns:
        JSON values: sizes, `bits_per_byte`, `bits_per_byte_stderr` (over documents, null for a
        single one), `nats_per_token`, `token_perplexity`,
        `word_perplexity` (null where undefined), and `curve`, the mean loss over positions
        grouped by powers of two.

    Raises:
        ValueError: there is no token to score, or a loss is not finite.
    """
    description = f"perplexity {Path(path).name}"

    def work(todo: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = loaded.encode_batch([documents[int(id)].text for id in todo])
        ids = dict(zip(todo, rows, strict=True))
        # Longest first, in groups of similar lengths; a stopped run loses one group.
        todo = sorted(todo, key=lambda id: -len(ids[id]))
        total = sum(max(len(sequence) - 1, 0) for sequence in ids.values())
        quiet = not processes().is_main_process
        with tqdm(
            total=total, desc=description, unit="token", unit_scale=True, disable=quiet
        ) as bar:
            for start in range(0, len(todo), batch_size):
                group = todo[start : start + batch_size]
                scores = score_tokens(
                    loaded.model,
                    [ids[id] for id in group],
                    window=window,
                    stateful=stateful,
                    batch_size=batch_size,
                    description=description,
                    bar=bar,
                )
                for id, score in zip(group, scores, strict=True):
                    yield id, {"curve": position_sums(score)}

    every = [str(i) for i in range(len(documents))]
    if samples is None:
        done = dict(work(every))
        scored = [done[id] for id in every]
    else:
        texts = "\n".join(hashlib.sha256(d.text.encode()).hexdigest() for d in documents)
        settings = {
            "documents": hashlib.sha256(texts.encode()).hexdigest(),
            "window": window,
            "stateful": stateful,
        }
        task = re.sub(r"[^\w.+=,-]", "_", Path(path).name)
        store = SampleStore(
            samples, model=loaded.identity, section="perplexity", task=task, settings=settings
        )
        scored = finish(store, every, work)
    curve = add_curves([document["curve"] for document in scored])
    tokens = sum(p["tokens"] for p in curve)
    if tokens == 0:
        raise ValueError(f"{path}: no token to score, its documents have one token and no prefix")
    total = math.fsum(p["total"] for p in curve)
    sizes = [len(document.text.encode("utf-8")) for document in documents]
    size = sum(sizes)
    nats = [sum(p["total"] for p in document["curve"]) for document in scored]
    words = sum(len(document.text.split()) for document in documents)
    return {
        "file": path,
        "sha256": sha256(path),
        "documents": len(documents),
        "bytes": size,
        "words": words,
        "tokens": tokens,
        "nats": total,
        "bits_per_byte": total / math.log(2) / size,
        "bits_per_byte_stderr": ratio_stderr(nats, sizes),
        "nats_per_token": total / tokens,
        "token_perplexity": _exp(total / tokens),
        "word_perplexity": _exp(total / words) if words else None,
        "curve": [
            {
                "start": p["start"],
                "end": p["end"],
                "tokens": p["tokens"],
                "nats": p["total"] / p["tokens"],
            }
            for p in curve
        ],
    }


def ratio_stderr(nats: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Return the standard error of sum(nats) / sum(sizes) in bits, from the spread over documents.

    The usual linear approximation for a ratio of sums; None for a single document.
    """
    n = len(nats)
    if n < 2:
        return None
    ratio = sum(nats) / sum(sizes)
    squares = sum((a - ratio * b) ** 2 for a, b in zip(nats, sizes, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(sizes) / math.log(2)


def _exp(value: float) -> float | None:
    """Return e^value, or None beyond the range of a float (word perplexity of a wild model)."""
    return math.exp(value) if value < 700 else None


def position_sums(score: TokenScores) -> list[dict[str, Any]]:
    """Sum one sequence's losses over the position ranges 0, 1, 2-3, 4-7, 8-15, ...

    Returns:
        One {"start", "end", "tokens", "total"} per non-empty range, `end` exclusive.
    """
    bucket = np.frexp(score.position.astype(np.float64))[1]  # the number of binary digits
    curve = []
    for b in np.unique(bucket):
        inside = score.nats[bucket == b].astype(np.float64)
        curve.append(
            {
                "start": 0 if b == 0 else 2 ** (int(b) - 1),
                "end": 2 ** int(b),
                "tokens": len(inside),
                "total": float(inside.sum()),
            }
        )
    return curve


def add_curves(curves: Iterable[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Add up the sums of several sequences, range by range."""
    ranges: dict[int, dict[str, Any]] = {}
    for point in (point for curve in curves for point in curve):
        known = ranges.setdefault(point["start"], {**point, "tokens": 0, "total": 0.0})
        known["tokens"] += point["tokens"]
        known["total"] += point["total"]
    return [ranges[start] for start in sorted(ranges)]
