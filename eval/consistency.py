"""Whether a model gives the same answer however it is asked.

Each comparison takes the log-probabilities of the same tokens computed in two ways and reports the
largest difference in nats. A model that fails one of them cannot be trusted with the evaluation
that works that way: batches with padding, long prompts in pieces, generation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from eval.documents import read_documents, sha256
from eval.model import LoadedModel
from eval.options import ConsistencyOptions

# Rounding in another order: fp32 sums over a few hundred terms; a bfloat16 logit near 16 is known
# to 0.06.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.1


def run_consistency(loaded: LoadedModel, options: ConsistencyOptions) -> dict[str, Any]:
    """Compare ways of computing the same.

    Args:
        loaded: the model.
        options: see `ConsistencyOptions`.

    Returns:
        JSON values: `comparisons`, one {"name", "difference", "tolerance", "passed", "tokens"}
        each, the difference in nats; `generation`, {"equal", "prompts"}: greedy continuations of a
        batch padded on the left that equal those of single prompts.
    """
    model = loaded.model
    texts = _pieces(loaded, options)
    whole = [_whole(model, ids) for ids in texts]
    pad = loaded.tokenizer.pad_token_id or 0
    ways = {
        "batch padded on the right, no mask": _right_padded(model, texts, pad, options.batch_size),
        "batch padded on the left, with a mask": _left_padded(
            model, texts, pad, options.batch_size
        ),
        "in pieces, the cache carried on": [_pieced(model, ids, options.piece) for ids in texts],
        "token by token": [_pieced(model, ids, 1, first=len(ids) // 2) for ids in texts],
    }
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    comparisons = []
    for name, values in ways.items():
        difference = max(
            float((a[-len(b) :] - b).abs().max()) for a, b in zip(whole, values, strict=True)
        )
        comparisons.append(
            {
                "name": name,
                "difference": difference,
                "tolerance": tolerance,
                "passed": difference <= tolerance,
                "tokens": sum(map(len, values)),
            }
        )
    return {
        "files": [{"file": file, "sha256": sha256(file)} for file in options.files],
        "samples": len(texts),
        "comparisons": comparisons,
        "generation": _generation(loaded, texts, pad, options),
    }


def _pieces(loaded: LoadedModel, options: ConsistencyOptions) -> list[list[int]]:
    """Cut sequences of different lengths, half to all of `tokens`, from the documents."""
    texts: list[list[int]] = []
    for file in options.files:
        for document in read_documents(file):
            ids = loaded.encode(document.text)[len(loaded.prefix) :]
            start = 0
            while len(texts) < options.samples:
                size = options.tokens - (7 * len(texts)) % (options.tokens // 2)
                if start + size > len(ids):
                    break
                texts.append([*loaded.prefix, *ids[start : start + size]])
                start += size
    if not texts:
        raise ValueError(f"consistency.files hold no text of {options.tokens} tokens")
    return texts


def _picked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of targets (n,) under logits (n, vocabulary), in fp32 on the CPU."""
    scores = logits.float().log_softmax(-1)
    return scores.gather(-1, targets[:, None].to(scores.device))[:, 0].cpu()


@torch.no_grad()
def _whole(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    row = torch.tensor([ids], device=model.device)
    return _picked(model(input_ids=row[:, :-1]).logits[0], row[0, 1:])


@torch.no_grad()
def _pieced(model: PreTrainedModel, ids: Sequence[int], piece: int, first: int = 0) -> torch.Tensor:
    """Read `first` tokens at once and the rest in pieces; scores what the pieces predict."""
    row = torch.tensor([ids], device=model.device)
    cache: dict[str, Any] = {"use_cache": True}
    values = []
    starts = [0] * (first > 0) + list(range(first, len(ids) - 1, piece))
    for start, end in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        output = model(input_ids=row[:, start:end], **cache)
        cache["past_key_values"] = output.past_key_values
        if start >= first:
            values.append(_picked(output.logits[0], row[0, start + 1 : end + 1]))
    return torch.cat(values)


@torch.no_grad()
def _right_padded(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], pad: int, batch_size: int
) -> list[torch.Tensor]:
    values = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        longest = max(map(len, batch))
        rows = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in batch])
        logits = model(input_ids=rows[:, :-1].to(model.device)).logits
        values += [
            _picked(logits[i, : len(ids) - 1], rows[i, 1 : len(ids)]) for i, ids in enumerate(batch)
        ]
    return values


def _left(texts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    rows = torch.tensor([[*[pad] * (longest - len(ids)), *ids] for ids in texts])
    mask = torch.tensor([[*[0] * (longest - len(ids)), *[1] * len(ids)] for ids in texts])
    return rows, mask


@torch.no_grad()
def _left_padded(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], pad: int, batch_size: int
) -> list[torch.Tensor]:
    values = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        rows, mask = _left(batch, pad)
        # As generate() passes them: positions count real tokens only.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=rows[:, :-1].to(model.device),
            attention_mask=mask[:, :-1].to(model.device),
            position_ids=positions[:, :-1].to(model.device),
        ).logits
        values += [
            _picked(logits[i, -(len(ids) - 1) :], rows[i, -(len(ids) - 1) :])
            for i, ids in enumerate(batch)
        ]
    return values


def _generation(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], pad: int, options: ConsistencyOptions
) -> dict[str, int]:
    def generate(batch: Sequence[Sequence[int]]) -> list[list[int]]:
        rows, mask = _left(batch, pad)
        output = loaded.model.generate(
            input_ids=rows.to(loaded.model.device),
            attention_mask=mask.to(loaded.model.device),
            do_sample=False,
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            pad_token_id=pad,
        )
        return output[:, rows.shape[1] :].tolist()

    prompts = texts[: options.batch_size]
    together = generate(prompts)
    equal = sum(generate([prompt]) == [new] for prompt, new in zip(prompts, together, strict=True))
    return {"equal": equal, "prompts": len(prompts)}
