"""Weights in the dtype that products are computed in, all formed at once.

Operators that take weights in fp32 and compute in 16 bits round them themselves, each by a kernel
of a few microseconds. In a pass of `NarrowWeights` they find them rounded.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssm_hf.ops.dispatch import keeps_activations


class NarrowWeights:
    """Copies of weights in 16 bits, kept from one pass to the next.

    A pass within `keep_activations` notes which weights are asked for. From then on all are rounded
    by one call when a pass begins. Weights must stay where they are in memory.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def in_pass(self, renew: bool = True) -> Generator[None, None, None]:
        """Within the block `narrow` gives the copies; `renew` them, for weights have changed."""
        if renew and self._copies:
            weights, copies = zip(*self._copies.values(), strict=True)
            with torch.no_grad():
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    list(copies), list(weights)
                )
        _current.append(self)
        try:
            yield
        finally:
            _current.pop()

    def find(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy of this weight in `dtype`, made if activations are kept; else None."""
        key = weight.data_ptr(), weight.shape, dtype
        if key not in self._copies:
            if not keeps_activations():
                return None
            weight = weight.detach()
            self._copies[key] = weight, weight.to(dtype)
        return self._copies[key][1]


_current: list[NarrowWeights] = []


def narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight.to(dtype); in a pass of `NarrowWeights` as it was when that began."""
    copy = _copy(weight, dtype)
    return weight.to(dtype) if copy is None else copy


def is_kept(weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether what `narrow` gives lasts, so that nobody else has to keep it; None lasts."""
    return weight is None or weight.dtype == dtype or _copy(weight, dtype) is not None


def _copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is no parameter may be gone in the next pass, and something else in its place."""
    if not _current or type(weight) is not nn.Parameter or torch.compiler.is_compiling():
        return None
    return None if weight.dtype == dtype else _current[-1].find(weight, dtype)
