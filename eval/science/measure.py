"""Measuring a model on a task: accuracies, and whether it plays by the rules.

A predictor maps samples to logits at their labels. Honest ones read the inputs alone; the controls
here do not, and the checks must tell.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from eval.tasks import IGNORED, Samples, Task

# samples -> logits (M, V) at the M labels, row after row
Predictor = Callable[[Samples], Tensor]

# Tokens of a forward pass.
BATCH_TOKENS = 2**16
# Predictions that may change for no reason: ties between equal logits.
TOLERATED = 0.02
# Roundings of the logits: an influence that ends above so many was cut off, below it has faded.
FADED = 32


class Selection(NamedTuple):
    """What gates of selective attention did in one batch.

    Attributes:
        tokens: number of tokens.
        selected: how many of them a layer selects, the mean over layers.
        asked: number of tokens that an answer is asked of.
        asked_selected: how many of those some layer selects.
    """

    tokens: float
    selected: float
    asked: float
    asked_selected: float


class ModelPredictor:
    """The logits of a causal language model at the labels of samples.

    Positions are gathered before the head, so no logits of whole sequences are ever held.

    Attributes:
        selection: what gates of the model did with the latest samples; None where it has none.

    Args:
        model: any of transformers' causal language models, in eval mode.
        autocast: dtype of the products, None for the parameters' own.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
        self.model, self.autocast = model, autocast
        self.selection: Selection | None = None

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        samples = samples.to(self.model.device)
        asked = samples.labels[:, 1:] != IGNORED
        device = self.model.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            gated = {"output_gates": True} if hasattr(self.model.config, "output_gates") else {}
            out = self.model.base_model(input_ids=samples.input_ids, use_cache=False, **gated)
            hidden = out[0]
            head: Any = self.model.get_output_embeddings()
            logits = head(hidden[:, :-1][asked])
        gates = getattr(out, "gates", None)
        if gates:
            flags = torch.stack([gate.selected for gate in gates])
            counts = (flags.float().mean(0).sum(), asked.sum(), flags.any(0)[:, :-1][asked].sum())
            self.selection = Selection(flags[0].numel(), *map(float, counts))
        return logits.float()


def targets(samples: Samples) -> Tensor:
    """(M,): the labels in a predictor's order."""
    return samples.labels[samples.labels != IGNORED]


# --- controls -------------------------------------------------------------------------------------


class LeakedLabels:
    """A predictor that is told some of the answers."""

    def __init__(self, predictor: Predictor, share: float) -> None:
        self.predictor, self.share = predictor, share

    def __call__(self, samples: Samples) -> Tensor:
        logits = self.predictor(samples)
        labels = targets(samples).to(logits.device)
        count = torch.arange(len(labels) + 1, device=logits.device) * self.share
        told = count.floor().diff() > 0  # evenly spread
        answer = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
        return logits.masked_fill(told[:, None] & answer, 1e4)


class WipedState:
    """A predictor whose memory is wiped every so many tokens: each window is read afresh."""

    def __init__(self, predictor: Predictor, every: int) -> None:
        self.predictor, self.every = predictor, every

    def __call__(self, samples: Samples) -> Tensor:
        rows, tokens = samples.input_ids.shape
        asked = samples.labels != IGNORED
        logits: Tensor | None = None
        for start in range(0, tokens, self.every):
            # One slot more: the label behind the window's last token belongs to it.
            window = slice(start, start + self.every + 1)
            labels = samples.labels[:, window].clone()
            labels[:, 0] = IGNORED
            part = Samples(samples.input_ids[:, window], labels, samples.lengths)
            here = labels != IGNORED
            if not here.any():
                continue
            found = self.predictor(part)
            if logits is None:
                logits = found.new_zeros(rows, tokens, found.shape[1])
            logits[:, window][here.to(found.device)] = found
        assert logits is not None  # samples have labels
        return logits[asked.to(logits.device)]


# --- accuracy -------------------------------------------------------------------------------------


def accuracy(
    predictor: Predictor, task: Task, length: int, samples: int, generator: Generator
) -> dict[str, Any]:
    """Accuracies on fresh samples of one length.

    Returns:
        {"samples", "string", "token", "last"}: how many, the share of samples with all labels
        right, of labels, and of last labels; with {"scaled", "scaled_last"} where the task has a
        number of choices C: (accuracy - 1/C) / (1 - 1/C), of labels and of last labels; with
        {"selected", "selected_asked"} where the model selects: the share of all tokens that a layer
        selects, and of those that an answer is asked of, by some layer.
    """
    size = max(1, BATCH_TOKENS // task.tokens(length))
    right_tokens = tokens = right_strings = right_last = 0
    selections: list[Selection] = []
    for begin in range(0, samples, size):
        batch = task.sample([length] * min(size, samples - begin), generator)
        predicted = predictor(batch).argmax(-1).cpu()
        selection = getattr(predictor, "selection", None)
        if selection is not None:
            selections.append(selection)
        right = torch.zeros_like(batch.labels, dtype=torch.bool)
        asked = batch.labels != IGNORED
        right[asked] = predicted == targets(batch)
        right_tokens += int(right.sum())
        tokens += int(asked.sum())
        right_strings += int((right == asked).all(1).sum())
        index = torch.arange(batch.labels.shape[1])
        last = torch.where(asked, index, 0).argmax(1)
        right_last += int(right.gather(1, last[:, None]).sum())
    result = {
        "samples": samples,
        "string": right_strings / samples,
        "token": right_tokens / tokens,
        "last": right_last / samples,
    }
    if task.choices is not None:
        result["scaled"] = scaled(result["token"], task.choices)
        result["scaled_last"] = scaled(result["last"], task.choices)
    if selections:
        total = Selection(*map(sum, zip(*selections, strict=True)))
        result["selected"] = total.selected / total.tokens
        result["selected_asked"] = total.asked_selected / total.asked
    return result


def scaled(share: float, choices: int) -> float:
    """Accuracy with 0 = chance among equally likely choices and 1 = perfect."""
    return (share - 1 / choices) / (1 - 1 / choices)


# --- rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Integrity:
    """What a predictor reads.

    Args:
        follows_labels: share of its predictions that change when nothing but labels changes.
        sees_ahead: share that changes when only later inputs change.
        reach: tokens over which a changed input still changes an output, as far as looked for.
        needed: how far was looked for.
        edge: the change at that distance in roundings of the largest logit: a memory that fades
            ends there, one that is cut off ends above.
        wiped: the reach falls short of what was looked for, and it was cut off.
        leaks: one of the two shares is more than ties explain.
    """

    follows_labels: float
    sees_ahead: float
    reach: int
    needed: int
    edge: float
    wiped: bool
    leaks: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def integrity(predictor: Predictor, task: Task, length: int, generator: Generator) -> Integrity:
    """Check a predictor by changing what it must not read, and the most distant of what it must.

    Args:
        predictor: in full precision, so that faint influences are not rounded away.
        task, length: whose samples are used, 32 of them.
        generator: of the samples and of the changes.
    """
    samples = task.sample([length] * 32, generator)
    follows = _follows_labels(predictor, samples, generator)
    ahead = _sees_ahead(predictor, samples, generator)
    reach, needed, edge = _reach(predictor, samples)
    return Integrity(
        follows_labels=follows,
        sees_ahead=ahead,
        reach=reach,
        needed=needed,
        edge=edge,
        wiped=reach < needed and edge > FADED,
        leaks=max(follows, ahead) > TOLERATED,
    )


def _follows_labels(predictor: Predictor, samples: Samples, generator: Generator) -> float:
    asked = samples.labels != IGNORED
    known = samples.labels[asked]
    other = samples.labels.clone()
    # Among the answers that occur, so that no label is out of the vocabulary.
    order = torch.randperm(len(known), generator=generator)
    other[asked] = known[order]
    before = predictor(samples).argmax(-1)
    after = predictor(samples._replace(labels=other)).argmax(-1)
    return (before != after).float().mean().item()


def _sees_ahead(predictor: Predictor, samples: Samples, generator: Generator) -> float:
    """Inputs from a random label's slot on are taken from another sample."""
    asked = samples.labels != IGNORED
    weights = torch.rand(asked.shape, generator=generator) * asked
    cut = weights.argmax(1, keepdim=True)
    index = torch.arange(asked.shape[1])
    changed = torch.where(index >= cut, samples.input_ids.roll(1, 0), samples.input_ids)
    before = predictor(samples).argmax(-1).cpu()
    after = predictor(samples._replace(input_ids=changed)).argmax(-1).cpu()
    earlier = (index <= cut)[asked]
    return (before != after)[earlier].float().mean().item()


def _reach(predictor: Predictor, samples: Samples) -> tuple[int, int, float]:
    """The largest distance from a changed input to a changed output, the largest possible, and the
    change there in roundings.

    Inputs are changed at four places of the first half, each in all samples at once.
    """
    ids = samples.input_ids[:8]
    rows, tokens = ids.shape
    everywhere = torch.zeros_like(ids)
    everywhere[:, 0] = IGNORED
    whole = Samples(ids, everywhere, samples.lengths[:8])

    def outputs(inputs: Tensor) -> Tensor:
        return predictor(whole._replace(input_ids=inputs)).view(rows, tokens - 1, -1)

    before = outputs(ids)
    noise = (outputs(ids) - before).abs().max()  # 0 wherever sums are taken in a fixed order
    places = sorted({0, tokens // 8, tokens // 4, tokens // 2})
    changes = before.new_zeros(tokens - 1)  # the largest at each distance
    for place in places:
        changed = ids.clone()
        changed[:, place] = torch.where(ids[:, place] == ids.max(), ids.min(), ids.max())
        size = (outputs(changed) - before).abs().amax((0, 2))[place:]
        changes[: len(size)] = changes[: len(size)].maximum(size)
    seen = (changes > 2 * noise).nonzero()
    if not len(seen):
        return 0, tokens - 2, 0.0
    reach = int(seen.max())
    rounding = torch.finfo(before.dtype).eps * before.abs().max()
    return reach, tokens - 2, float(changes[reach] / rounding)
