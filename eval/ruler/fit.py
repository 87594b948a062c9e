"""Samples of the largest size that the tokenizer and the length allow, never one token more."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from eval.ruler.templates import Wording
from eval.ruler.tokens import TokenCounter

ROUNDS = 12
TOKENS_AT_ONCE = 1 << 22
# Plans that are fitted first, to learn by how much the estimates are wrong.
LEARN_FROM = 4


class TooShortError(ValueError):
    """A length in which the smallest sample of a task does not fit."""


class Plan:
    """Everything about one sample but its size.

    All that is random is drawn when the plan is made, or from a seed drawn then, so that a size
    makes one text and no other.

    Attributes:
        lead: text before the prompt's head, a solved example.
        wording: head, tail and answer prefix.
        outputs: the reference answers.
        marks: texts in the context whose depth is of interest, one per output or fewer.
        minimum: the smallest size.
        tolerance: a sample whose free room is less than this share of it is not made longer.
    """

    lead: str = ""
    wording: Wording
    outputs: list[str]
    marks: Sequence[str] = ()
    minimum: int = 1
    tolerance: float = 0.005

    def estimate(self, size: int) -> int:
        """Return about how many tokens the context of this size has; never falls with size."""
        raise NotImplementedError

    def context(self, size: int) -> str:
        """Return the context of this size."""
        raise NotImplementedError

    def size_for(self, tokens: int) -> int:
        """Return the largest size whose estimate is at most `tokens`, found by bisection."""
        low, high = self.minimum, 2 * self.minimum
        if self.estimate(low) >= tokens:
            return low
        while self.estimate(high) <= tokens:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.estimate(middle) <= tokens:
                low = middle
            else:
                high = middle
        return low


@dataclass
class Sample:
    """One sample; the first five fields are named as in NVIDIA's files.

    Args:
        index: number of the sample.
        input: the prompt up to the answer prefix.
        answer_prefix: what the answer goes on from; the model reads input + answer_prefix.
        outputs: the reference answers.
        length: tokens of the prompt plus those that may be generated.
        tokens: of the prompt, with what the model is given before it.
        size: units of the task (sentences, words, lines, ...) in the context.
        depths: of the texts that hold the answers, 0 at the beginning of the context and 1 at its
            end, counted in the tokens around them; empty for tasks whose answer has no place.
    """

    index: int
    input: str
    answer_prefix: str
    outputs: list[str]
    length: int
    tokens: int
    size: int
    depths: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as JSON values."""
        return asdict(self)


class Frame(NamedTuple):
    """What a model is given around every prompt.

    Args:
        before, after: text around the question (not around the answer prefix, which follows).
        prefix_tokens: tokens before the text.
        chat: before and after hold special tokens.
    """

    before: str = ""
    after: str = ""
    prefix_tokens: int = 0
    chat: bool = False


def make_frame(template: str, tokenizer: PreTrainedTokenizerFast, prefix_tokens: int) -> Frame:
    """Return the frame of a template.

    Args:
        template: "base" is none, "chat" the tokenizer's own chat template with the question as the
            user's turn and the answer prefix as the beginning of the assistant's.
        tokenizer: of the model.
        prefix_tokens: tokens that "base" puts before the text.

    Raises:
        ValueError: there is no chat template, or it does not keep the user's text as it is.
    """
    if template == "base":
        return Frame(prefix_tokens=prefix_tokens)
    if tokenizer.chat_template is None:
        raise ValueError('ruler.template is "chat" but the tokenizer has no chat template')
    marker = "Text of the user"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(rendered).partition(marker)
    if not found or marker in after:
        raise ValueError("the tokenizer's chat template does not hold the user's text just once")
    return Frame(before, after, chat=True)


class _Draft:
    """A plan on its way to its size: the best that fits and the least that does not."""

    def __init__(self, plan: Plan, guess: int) -> None:
        self.plan = plan
        self.size = plan.size_for(guess)
        self.guess = guess
        self.best: tuple[int, str, int, list[float]] | None = None
        self.failing: int | None = None
        self._fails = 0

    def judge(self, context: str, tokens: int, depths: list[float], room: int) -> bool:
        """Note how the present size came out, choose the next; returns whether it is settled."""
        plan, size = self.plan, self.size
        slack = room - tokens
        # A little less may be the same text: every failure steps back twice as far.
        self.guess += slack if slack >= 0 else slack << self._fails
        self._fails += slack < 0
        if slack >= 0:
            if self.best is None or size > self.best[0]:
                self.best = (size, context, tokens, depths)
            growth = plan.estimate(size + 1) - plan.estimate(size)
            if slack < max(growth, room * plan.tolerance):
                return True
            self.size = max(plan.size_for(self.guess), size + 1)
        else:
            self.failing = size if self.failing is None else min(self.failing, size)
            if size <= plan.minimum:
                return True
            self.size = max(plan.minimum, min(plan.size_for(self.guess), size - 1))
        low = self.best[0] if self.best else plan.minimum - 1
        if self.failing is not None:
            if self.failing - low <= 1:
                return True
            if not low < self.size < self.failing:
                self.size = (low + self.failing) // 2
        return False


def fit(
    plans: Iterable[Plan],
    counter: TokenCounter,
    frame: Frame,
    *,
    length: int,
    budget: int,
    name: str,
) -> Iterator[Sample]:
    """Yield the sample of each plan at the largest size that fits.

    The pieces' tokens give a first size, whole prompts are counted, and the size is corrected until
    the next larger one would not fit. Only sizes whose whole prompt was counted are taken.

    Args:
        plans: numbered from 0.
        counter: of the model's tokenizer.
        frame: around every prompt.
        length: most tokens of a prompt and its answer together.
        budget: most tokens of the answer.
        name: of the task, for messages.

    Raises:
        TooShortError: not even the smallest size of a sample fits.
    """
    at_once = max(LEARN_FROM, TOKENS_AT_ONCE // length)
    numbered = iter(enumerate(plans))
    spare = 0
    for size in itertools.chain([LEARN_FROM], itertools.repeat(at_once)):
        chunk = list(itertools.islice(numbered, size))
        if not chunk:
            return
        samples, spare = _fit_chunk(chunk, counter, frame, length, budget, name, spare)
        yield from samples


def _fit_chunk(
    chunk: list[tuple[int, Plan]],
    counter: TokenCounter,
    frame: Frame,
    length: int,
    budget: int,
    name: str,
    spare: int,
) -> tuple[list[Sample], int]:
    """Return the samples, and how many tokens the estimates were short of at most."""
    room = length - budget - frame.prefix_tokens
    around = [
        text
        for _, plan in chunk
        for text in (_before(plan, frame), _after(plan, frame) + plan.wording.prefix)
    ]
    fixed = counter.count(around)
    drafts = [
        _Draft(plan, room - spare - fixed[2 * i] - fixed[2 * i + 1])
        for i, (_, plan) in enumerate(chunk)
    ]
    pending = drafts
    for attempt in range(ROUNDS + 1):
        if attempt == ROUNDS:  # the last resort of those that nothing fitted so far
            pending = [draft for draft in pending if draft.best is None]
            for draft in pending:
                draft.size = draft.plan.minimum
        if not pending:
            break
        contexts = [draft.plan.context(draft.size) for draft in pending]
        measured = _measure([d.plan for d in pending], contexts, counter, frame)
        if attempt == 0:
            errors = [
                tokens - sum(fixed[2 * i : 2 * i + 2]) - draft.plan.estimate(draft.size)
                for i, (draft, (tokens, _)) in enumerate(zip(drafts, measured, strict=True))
            ]
        pending = [
            draft
            for draft, context, (tokens, depths) in zip(pending, contexts, measured, strict=True)
            if not draft.judge(context, tokens, depths, room)
        ]
    samples = [
        _sample(index, draft, frame, length, budget, name, counter)
        for (index, _), draft in zip(chunk, drafts, strict=True)
    ]
    return samples, max(*errors, 0)


def _before(plan: Plan, frame: Frame) -> str:
    return frame.before + plan.lead + plan.wording.head


def _after(plan: Plan, frame: Frame) -> str:
    return plan.wording.tail + frame.after


def _measure(
    plans: Sequence[Plan], contexts: Sequence[str], counter: TokenCounter, frame: Frame
) -> list[tuple[int, list[float]]]:
    """Return the tokens of whole prompts and the depths of their marks."""
    texts, places = [], []
    for plan, context in zip(plans, contexts, strict=True):
        before = _before(plan, frame)
        texts.append(before + context + _after(plan, frame) + plan.wording.prefix)
        starts = [context.index(mark) for mark in plan.marks]
        ends = [start + len(mark) for start, mark in zip(starts, plan.marks, strict=True)]
        places.append([len(before) + i for i in (0, len(context), *starts, *ends)])
    if not any(plan.marks for plan in plans):
        return [(tokens, []) for tokens in counter.count(texts)]
    return [(tokens, _depths(at[0], at[1], at[2:])) for tokens, at in counter.locate(texts, places)]


def depths_of(
    counter: TokenCounter, frame: Frame, plan: "Plan | Any", context: str
) -> tuple[int, list[float]]:
    """Return the tokens of one prompt and the depths of the marks in its context."""
    (measured,) = _measure([plan], [context], counter, frame)
    return measured


def _depths(first: int, last: int, at: Sequence[int]) -> list[float]:
    starts, ends = at[: len(at) // 2], at[len(at) // 2 :]
    depths = []
    for start, end in zip(starts, ends, strict=True):
        around = max((last - first) - (end - start), 1)
        depths.append(round(min(max((start - first) / around, 0.0), 1.0), 4))
    return depths


def _sample(
    index: int,
    draft: _Draft,
    frame: Frame,
    length: int,
    budget: int,
    name: str,
    counter: TokenCounter,
) -> Sample:
    plan = draft.plan
    if draft.best is None:
        ((least, _),) = _measure([plan], [plan.context(plan.minimum)], counter, frame)
        raise TooShortError(
            f"ruler task {name} does not fit in {length} tokens: with this tokenizer its smallest "
            f"prompt (sample {index}) has {least + frame.prefix_tokens} tokens and the answer "
            f"needs {budget}"
        )
    size, context, tokens, depths = draft.best
    tokens += frame.prefix_tokens
    return Sample(
        index=index,
        input=_before(plan, frame) + context + _after(plan, frame),
        answer_prefix=plan.wording.prefix,
        outputs=plan.outputs,
        length=tokens + budget,
        tokens=tokens,
        size=size,
        depths=depths,
    )
