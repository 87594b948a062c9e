"""The kernels that choose tokens against the torch path, which has transformers' arithmetic."""

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from ssm_hf.generation.fused import FusedSelection
from ssm_hf.generation.select import Recipe, Request, Selection
from tests.helpers import kernel_device

DEVICE = kernel_device()
RECIPES = {
    "greedy": Recipe(),
    "greedy, all else": Recipe(penalty=1.4, eos=(3, 7, 11), pad=2, suppressed=(3, 5)),
    "plain": Recipe(sample=True),
    "temperature": Recipe(sample=True, temperature=0.7),
    "top-k": Recipe(sample=True, top_k=17),
    "top-k, more than there are": Recipe(sample=True, top_k=10**6),
    "top-k and top-p of many": Recipe(sample=True, top_k=300, top_p=0.9),
    "top-p": Recipe(sample=True, top_p=0.8),
    "top-p, one token": Recipe(sample=True, top_p=0.0),
    "min-p": Recipe(sample=True, min_p=0.05),
    "all": Recipe(sample=True, penalty=1.2, temperature=1.3, top_k=40, top_p=0.9, min_p=0.01,
                  eos=(1,), pad=0, suppressed=(1, 2)),
}  # fmt: skip


def _run(kind: type[Selection], recipe: Recipe, logits: list[Tensor], ids: Tensor):
    batch, vocabulary = logits[0].shape
    penalty = RepetitionPenaltyLogitsProcessor(recipe.penalty) if recipe.penalty != 1 else None
    selection = kind(recipe, batch, vocabulary, DEVICE)
    selection.start(Request(recipe, None, 2 if recipe.suppressed else 0, penalty), ids)
    torch.manual_seed(0)
    tokens = []
    for step in logits:
        selection.choose(step)
        tokens.append(selection.tokens[:, 0].tolist())
    chosen = selection.chosen[:, : len(logits)].T.tolist()
    assert chosen == tokens
    assert int(selection.count) == len(logits)
    return tokens, selection


@pytest.mark.parametrize(("name", "ties"), [
    *((name, False) for name in RECIPES),
    *((name, True) for name in ("greedy", "top-k", "top-p", "all")),
])  # fmt: skip
def test_fused_choice_equals_torch(name: str, ties: bool) -> None:
    recipe, batch, vocabulary = RECIPES[name], 2, 1100
    logits = [3 * torch.randn(batch, vocabulary, device=DEVICE) for _ in range(2)]
    if ties:
        # 8 bits: many equal scores, also where top-k and top-p cut
        logits = [step.bfloat16().float() for step in logits]
    ids = torch.randint(0, vocabulary, (batch, 30), device=DEVICE)
    tokens, selection = _run(FusedSelection, recipe, logits, ids)
    expected, reference = _run(Selection, recipe, logits, ids)
    assert tokens == expected
    assert torch.equal(selection.unfinished, reference.unfinished)
    assert bool(selection.alive) == bool(reference.alive)
    if reference.seen is not None and selection.seen is not None:
        assert torch.equal(selection.seen, reference.seen)
    if selection.broken is not None:
        assert not bool(selection.broken)


@pytest.mark.parametrize("recipe", [Recipe(sample=True), Recipe(sample=True, top_k=5, top_p=0.5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_cannot_be_drawn_from_are_noted(recipe: Recipe, value: float) -> None:
    logits = torch.randn(1, 1100, device=DEVICE)
    if value == float("-inf"):
        logits[0] = value
    else:
        logits[0, 1050] = value
    ids = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    _, selection = _run(FusedSelection, recipe, [logits], ids)
    assert selection.broken is not None
    assert bool(selection.broken)


def test_draws_follow_the_distribution() -> None:
    # The interpreter would take a minute; that both kinds draw the same is tested above.
    kind, draws = FusedSelection if DEVICE.type == "cuda" else Selection, 1000
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]], device=DEVICE).repeat(draws, 1)
    # Of the five best tokens' shares, the last one alone does not exceed 1 - top_p.
    recipe = Recipe(sample=True, top_k=5, top_p=0.95)
    ids = torch.zeros(draws, 1, dtype=torch.long, device=DEVICE)
    tokens, _ = _run(kind, recipe, [logits], ids)
    counts = torch.bincount(torch.tensor(tokens[0]), minlength=6)
    share = torch.softmax(logits[0, :4], 0).cpu()
    assert counts[4:].sum() == 0
    statistic = ((counts[:4] - draws * share) ** 2 / (draws * share)).sum()
    # the 99.9 % quantile of Pearson's statistic at 3 degrees of freedom
    assert statistic < 16.3
