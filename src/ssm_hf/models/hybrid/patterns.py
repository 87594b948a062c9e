"""Patterns of blocks as short strings."""

import re

# The letters in which Nemotron-H writes its patterns.
_LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
_TOKEN = re.compile(r"\s*(?:(\d+)\s*\*|([()])|([A-Za-z_]\w*))")


def expand_pattern(pattern: str) -> list[str]:
    """The blocks that a pattern stands for.

    Words follow one another; `3*word` and `3*(two words)` repeat. A string of Nemotron-H's letters,
    `M` (mamba2), `*` (attention), `-` (mlp) and `E` (moe), is understood too.

        expand_pattern("2*(3*mamba2 attention) mlp")
        expand_pattern("M-M*-")

    Among the patterns of published models:

    - mamba2attn: `"9*mamba2 4*(attention 8*mamba2) attention 10*mamba2 attention 7*mamba2"`
    - Mamba-2-MLP-Attention: `"4*(4*(mamba2 mlp) attention mlp 3*(mamba2 mlp))"`
    - Samba: `"12*(mamba1 mlp sliding_attention mlp)"`
    - Mamba-3, five to one: `"4*(5*(mamba3 mlp) attention mlp)"`
    - Jamba with Mamba-2: `"4*(2*(mamba2 mlp mamba2 moe) attention mlp mamba2 moe mamba2 mlp mamba2
      moe)"`
    - Zamba2: `"9*(6*mamba2 attention mlp)"`, with options that share attention and MLP
    - Nemotron-H-8B: `"M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"`

    Raises:
        ValueError: the string is not such a pattern; the message shows where.
    """
    if re.fullmatch(r"[M*\-E]+", pattern):
        return [_LETTERS[letter] for letter in pattern]
    stack: list[tuple[int, list[str]]] = [(1, [])]
    repeat, at = 1, 0
    text = pattern.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _error(pattern, at, "expected a word, a number with *, or a parenthesis")
        count, bracket, word = match.groups()
        if count is not None:
            if repeat != 1 or int(count) < 1:
                raise _error(pattern, at, "a repetition must be one number of at least 1")
            repeat = int(count)
        elif bracket == "(":
            stack.append((repeat, []))
            repeat = 1
        elif bracket == ")":
            if len(stack) == 1 or repeat != 1 or not stack[-1][1]:
                raise _error(pattern, at, "nothing to close")
            times, inner = stack.pop()
            stack[-1][1].extend(times * inner)
        else:
            stack[-1][1].extend(repeat * [word])
            repeat = 1
        at = match.end()
    if len(stack) > 1 or repeat != 1:
        raise _error(pattern, len(pattern), "a parenthesis or a repetition is left open")
    return stack[0][1]


def _error(pattern: str, at: int, what: str) -> ValueError:
    return ValueError(f"blocks={pattern!r}, at character {at}: {what}")
