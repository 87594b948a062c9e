"""Numbers over seeds -> what they say, and the smallest effect that they could have shown.

A difference counts only beyond its resolution: half the width of the 95 % interval that follows
from the spread over seeds (Student's t; Welch for two groups) and from the finite number of test
samples (Wilson), added as independent errors. Within it a check is not decided.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eval.ruler.scoring import wilson

Verdict = Literal["confirmed", "not confirmed", "not decided", "not tested"]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# A difference of two groups that is coarser than this cannot say that they are the same.
COARSE = 0.2


def t_quantile(degrees: float) -> float:
    """The 97.5 % quantile of Student's t.

    Between whole degrees of freedom the next lower one is taken, which is the cautious side; above
    10 the expansion of Cornish and Fisher in two terms, good to 0.002.
    """
    if degrees < 1:
        return math.inf
    if degrees < len(T_975) + 1:
        return T_975[int(degrees) - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass(frozen=True)
class Sample:
    """One accuracy over seeds.

    Args:
        values: one a seed.
        tested: test samples behind each value.
        choices: of a scaled accuracy, None for shares.
    """

    values: tuple[float, ...]
    tested: int
    choices: int | None = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; nan for one."""
        if len(self.values) < 2:
            return math.nan
        mean = self.mean
        return math.sqrt(sum((v - mean) ** 2 for v in self.values) / (len(self.values) - 1))

    @property
    def sampling(self) -> float:
        """Half the 95 % interval of the mean from the finite number of test samples alone."""
        scale = 1.0 if self.choices is None else 1 - 1 / self.choices
        share = self.mean * scale + (1 - scale)
        low, high = wilson(min(1.0, max(0.0, share)), self.tested * len(self.values))
        return (high - low) / 2 / scale

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "mean": self.mean, "spread": _finite(self.spread)}


def resolution_of_mean(sample: Sample) -> float:
    """The smallest distance of the mean from a bound that can be told; inf for one seed."""
    count = len(sample.values)
    if count < 2:
        return math.inf
    by_seed = t_quantile(count - 1) * sample.spread / math.sqrt(count)
    return math.hypot(by_seed, sample.sampling)


def resolution_of_difference(a: Sample, b: Sample) -> float:
    """The smallest difference of two means that can be told; inf where a group has one seed."""
    if min(len(a.values), len(b.values)) < 2:
        return math.inf
    of_a, of_b = (s.spread**2 / len(s.values) for s in (a, b))
    total = of_a + of_b
    by_seed = 0.0
    if total > 0:
        parts = of_a**2 / (len(a.values) - 1) + of_b**2 / (len(b.values) - 1)
        by_seed = t_quantile(total**2 / parts) * math.sqrt(total)
    return math.hypot(by_seed, a.sampling, b.sampling)


@dataclass(frozen=True)
class Outcome:
    """What a check came to.

    Args:
        verdict: see `Verdict`.
        text: the comparison with its numbers.
        effect: by how much the check holds (negative: fails), None where nothing was measured.
        resolution: the smallest effect that could have been seen; None where unknown.
    """

    verdict: Verdict
    text: str
    effect: float | None = None
    resolution: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def judge(effect: float, resolution: float) -> Verdict:
    """An effect that should be positive."""
    if effect > resolution:
        return "confirmed"
    return "not confirmed" if effect < -resolution else "not decided"


def bound(sample: Sample, name: str, limit: float, *, lower: bool) -> Outcome:
    """Is the mean at least (lower) or at most `limit`?"""
    effect = sample.mean - limit if lower else limit - sample.mean
    resolution = resolution_of_mean(sample)
    sign = "≥" if lower else "≤"
    text = f"{name} {numbers(sample)} {sign} {limit:g}"
    return Outcome(judge(effect, resolution), text, effect, _finite(resolution))


def above(a: Sample, b: Sample, names: tuple[str, str], by: float) -> Outcome:
    """Does a exceed b by more than `by`?"""
    effect = a.mean - b.mean - by
    resolution = resolution_of_difference(a, b)
    text = f"{names[0]} {numbers(a)} > {names[1]} {numbers(b)}" + (f" by {by:g}" if by else "")
    return Outcome(judge(effect, resolution), text, effect, _finite(resolution))


def same(a: Sample, b: Sample, names: tuple[str, str]) -> Outcome:
    """Are two groups not to be told apart, by numbers that would have shown a difference?"""
    difference = abs(a.mean - b.mean)
    resolution = resolution_of_difference(a, b)
    if difference > resolution:
        verdict = "not confirmed"
    else:
        verdict = "confirmed" if resolution <= COARSE else "not decided"
    text = f"{names[0]} {numbers(a)} = {names[1]} {numbers(b)}"
    return Outcome(verdict, text, -difference, _finite(resolution))


def all_of(outcomes: Sequence[Outcome]) -> Verdict:
    """A claim holds if all its checks do, fails if one fails."""
    found = [outcome.verdict for outcome in outcomes]
    for verdict in ("not confirmed", "not tested", "not decided"):
        if verdict in found:
            return verdict
    return "confirmed" if found else "not tested"


def numbers(sample: Sample) -> str:
    """The mean, and the value of each seed."""
    return f"{sample.mean:.3f} ({', '.join(f'{v:.3f}' for v in sample.values)})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
