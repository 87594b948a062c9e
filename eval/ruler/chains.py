"""Variable tracking: a chain of assignments hidden in noise, and a solved example before it."""

import itertools
import string
from random import Random

from eval.ruler import templates
from eval.ruler.needles import NoisePlan
from eval.ruler.tokens import TokenCounter

HOPS = 4
EXAMPLE_TOKENS = 500
# Of a short length the example may take no more than this.
EXAMPLE_SHARE = 1 / 4


def assignments(names: list[str], value: str) -> list[str]:
    """Return the lines that give `value` to the first name and hand it on to the others."""
    first = f"VAR {names[0]} = {value}"
    # The space at the end is NVIDIA's.
    return [first, *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]


def draw_names(rng: Random, letters: int) -> list[str]:
    """Draw distinct names of capital letters, one for each variable of a chain."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


class Chain(NoisePlan):
    """The lines of one chain, in order, in noise.

    Args:
        rng: of the sample.
        counter: of the tokenizer.
        letters: of each name.
    """

    def __init__(self, rng: Random, counter: TokenCounter, letters: int = 5) -> None:
        names = draw_names(rng, letters)
        value = str(rng.randint(10_000, 99_998))
        lines = assignments(names, value)
        super().__init__(lines, sorted(rng.random() for _ in lines), counter)
        wording = templates.chain(value, len(names))
        # A space at the end of a prompt would have to be part of the answer's first token.
        self.wording = wording._replace(prefix=wording.prefix.rstrip())
        self.outputs = names
        # Without the space at the end, which the last line of a context may lose.
        self.marks = [line.rstrip() for line in lines]


class TrackedChain(Chain):
    """A chain with three letters a name, solved, and then the chain that is asked about.

    The example takes at most 500 tokens, or a quarter of `length` where that is less; where even
    the shortest one does not fit it stands without noise.
    """

    def __init__(self, rng: Random, counter: TokenCounter, length: int) -> None:
        super().__init__(rng, counter)
        example = Chain(rng, counter, letters=3)
        wording, answer = example.wording, " ".join(example.outputs)
        around = counter.count([wording.head, f"{wording.tail}{wording.prefix} {answer}\n\n"])
        room = min(EXAMPLE_TOKENS, int(length * EXAMPLE_SHARE)) - sum(around)
        size = example.size_for(room)
        self.lead = f"{wording.prompt(example.context(size))} {answer}\n\n"
