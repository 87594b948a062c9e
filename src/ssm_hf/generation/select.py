"""From logits to the next token: which requests are understood, and the choice itself."""

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

# The processors that are understood, in the only order that is; anything else is left to
# transformers' own loop. Exact types: a subclass may do something else.
_ORDER = (
    RepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


class Recipe(NamedTuple):
    """How tokens are chosen.

    Attributes:
        sample: draw, or take the largest score.
        penalty: repetition penalty, 1 = none.
        temperature: divides the scores.
        top_k: 0 = off.
        top_p: 1 = off.
        min_p: 0 = off.
        eos: tokens that end a row, () = none.
        pad: token that follows them.
        suppressed: tokens that may not be drawn before `min_new_tokens`.
    """

    sample: bool = False
    penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos: tuple[int, ...] = ()
    pad: int = 0
    suppressed: tuple[int, ...] = ()


class Request(NamedTuple):
    """A recipe with what differs from call to call.

    Attributes:
        recipe: how tokens are chosen.
        max_length: of prompt and new tokens together; None = until every row has ended.
        min_new_tokens: until then `recipe.suppressed` is not drawn.
        penalty: the processor that knows which of the prompt's tokens count, or None.
    """

    recipe: Recipe
    max_length: int | None
    min_new_tokens: int
    penalty: RepetitionPenaltyLogitsProcessor | None


def read_request(
    prompt_length: int,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> Request | str:
    """The request as `generate` prepared it, or the reason why it is not understood."""
    values: dict[str, float | int] = {}
    penalty, least, suppressed = None, 0, ()
    place = -1
    for processor in processors:
        name = type(processor).__name__
        if type(processor) not in _ORDER:
            return f"{name} is applied by transformers' loop"
        if _ORDER.index(type(processor)) <= place:
            return f"{name} comes in an unusual place"
        place = _ORDER.index(type(processor))
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            penalty = processor
            values["penalty"] = processor.penalty
        elif isinstance(processor, MinLengthLogitsProcessor):
            least = max(least, processor.min_length - prompt_length)
            suppressed += tuple(processor.eos_token_id.tolist())
        elif isinstance(processor, MinNewTokensLengthLogitsProcessor):
            skipped = processor.prompt_length_to_skip - prompt_length
            if suppressed and least != processor.min_new_tokens + skipped:
                return "min_length and min_new_tokens are both given"
            least = max(least, processor.min_new_tokens + skipped)
            suppressed += tuple(processor.eos_token_id.tolist())
        elif isinstance(processor, TemperatureLogitsWarper):
            values["temperature"] = processor.temperature
        elif isinstance(processor, TopKLogitsWarper):
            values["top_k"] = processor.top_k
        elif isinstance(processor, TopPLogitsWarper):
            values["top_p"] = processor.top_p
        elif isinstance(processor, MinPLogitsWarper):
            values["min_p"] = processor.min_p
        cut = getattr(processor, "filter_value", -math.inf)
        if cut != -math.inf or getattr(processor, "min_tokens_to_keep", 1) != 1:
            return f"{name} has unusual arguments"
    eos: tuple[int, ...] = ()
    for criterion in criteria:
        if type(criterion) not in _CRITERIA:
            return f"{type(criterion).__name__} is checked by transformers' loop"
        if isinstance(criterion, EosTokenCriteria):
            eos += tuple(criterion.eos_token_id.tolist())
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    pad: Tensor | None = config._pad_token_tensor  # pyright: ignore[reportAttributeAccessIssue]
    if eos and pad is None:
        return "there is no padding token"
    recipe = Recipe(
        sample=bool(config.do_sample),
        eos=eos,
        pad=int(pad) if eos and pad is not None else 0,
        suppressed=suppressed if least > 0 else (),
        **values,  # pyright: ignore[reportArgumentType]
    )
    return Request(recipe, min(lengths) if lengths else None, least, penalty)


class Selection:
    """Chooses tokens by a recipe and keeps what the choice depends on, all on the device.

    Nothing in `choose` depends on values the host knows, so a captured call can be replayed.

    Attributes:
        tokens: (B, 1) int64, the newest tokens, the next step's input.
        chosen: (B, capacity) int64, column t mod capacity holds the t-th new token.
        unfinished: (B,) bool, rows that have not ended.
        count: () int64, tokens chosen so far.
        alive: () bool, whether any row has not ended.
        broken: () bool, whether nothing could be drawn from some logits; None if nothing is drawn.
    """

    capacity = 1024

    def __init__(self, recipe: Recipe, batch: int, vocabulary: int, device: torch.device) -> None:
        self.recipe = recipe
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.chosen = torch.zeros(batch, self.capacity, dtype=torch.long, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.alive = torch.ones((), dtype=torch.bool, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device) if recipe.sample else None
        self.min_new_tokens = torch.zeros((), dtype=torch.long, device=device)
        self.eos = torch.tensor(recipe.eos, dtype=torch.long, device=device)
        self.seen: Tensor | None = None
        self.suppressed: Tensor | None = None
        if recipe.penalty != 1:
            self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        if recipe.suppressed:
            self.suppressed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.suppressed[list(recipe.suppressed)] = True

    @staticmethod
    def key(recipe: Recipe) -> Hashable:
        """Recipes of equal keys can share a selection, and so a captured step."""
        return recipe

    def start(self, request: Request, input_ids: Tensor) -> None:
        """Begin a call with the prompt input_ids (B, T)."""
        self.recipe = request.recipe
        self.unfinished.fill_(True)
        self.count.zero_()
        if self.broken is not None:
            self.broken.zero_()
        self.min_new_tokens.fill_(request.min_new_tokens)
        if self.seen is not None and request.penalty is not None:
            # The processor itself says which tokens count (pads do in some versions): it changes
            # the score 1 of just those.
            self.seen.zero_()
            if input_ids.shape[1]:
                ones = torch.ones(self.seen.shape, device=self.seen.device)
                self.seen.copy_(request.penalty(input_ids, ones) != 1)  # pyright: ignore[reportArgumentType]

    def take_over(self, other: "Selection") -> None:
        """Go on where another selection of the same key stands."""
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)
            else:
                setattr(self, name, value)

    def choose(self, logits: Tensor) -> None:
        """Take the next tokens by logits (B, V) of any float dtype and note them everywhere."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        recipe = self.recipe
        scores = self._scores(logits)
        token = self._draw(scores) if recipe.sample else scores.argmax(dim=-1)
        if recipe.eos:
            token = torch.where(self.unfinished, token, recipe.pad)
            self.unfinished &= (token[:, None] != self.eos).all(dim=1)
            self.alive.copy_(self.unfinished.any())
        column = token[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, column, True)
        self.chosen.scatter_(1, (self.count % self.capacity).expand_as(column), column)
        self.count += 1
        self.tokens.copy_(column)

    def _scores(self, logits: Tensor) -> Tensor:
        """The processed scores, with the arithmetic of transformers' processors."""
        recipe, scores = self.recipe, logits
        if self.seen is not None:
            changed = torch.where(scores < 0, scores * recipe.penalty, scores / recipe.penalty)
            scores = torch.where(self.seen, changed, scores)
        if self.suppressed is not None:
            early = self.count < self.min_new_tokens
            scores = scores.masked_fill(self.suppressed & early, -math.inf)
        if not recipe.sample:
            return scores
        if recipe.temperature != 1:
            scores = scores / recipe.temperature
        if recipe.top_k:
            top_k = min(recipe.top_k, scores.shape[-1])
            worst = torch.topk(scores, top_k).values[:, -1:]
            scores = scores.masked_fill(scores < worst, -math.inf)
        if recipe.top_p < 1:
            rising, order = torch.sort(scores, descending=False)
            removed = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - recipe.top_p
            removed[:, -1:] = False
            scores = scores.masked_fill(removed.scatter(1, order, removed), -math.inf)
        if recipe.min_p:
            share = torch.softmax(scores, dim=-1)
            scores = scores.masked_fill(share < recipe.min_p * share.amax(-1, keepdim=True),
                                        -math.inf)  # fmt: skip
        return scores

    def _draw(self, scores: Tensor) -> Tensor:
        """One draw a row: the largest p / q with q exponential is distributed as p.

        `torch.multinomial` does the same with the same numbers of the generator, but checks its
        input on the host.
        """
        share = torch.softmax(scores, dim=-1)
        if self.broken is not None:
            self.broken |= share[:, 0].isnan().any()
        return (share / torch.empty_like(share).exponential_()).argmax(dim=-1)
