"""Every scan and convolution as one kind of case, with a definition that knows no packing.

The definition runs each document of each row on its own, over its real tokens, one token at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import (
    Mamba3State,
    causal_conv1d,
    linear_scan,
    mamba3_scan,
    selective_scan,
    ssd,
)
from ssm_hf.ops.causal_conv1d import causal_conv1d_recurrent
from ssm_hf.ops.linear_scan import linear_scan_recurrent
from ssm_hf.ops.mamba3_scan import mamba3_scan_recurrent
from ssm_hf.ops.selective_scan import selective_scan_recurrent
from ssm_hf.ops.ssd import ssd_recurrent


@dataclass
class Case:
    """An operator with its inputs: `sequences` have a time dimension, `weights` have none."""

    run: Callable[..., Any]
    definition: Callable[..., tuple[Tensor, Tensor]]
    sequences: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[int, ...]]
    state: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    complex: bool = False
    # shape of y at one token, where it is not that of the first sequence
    output: tuple[int, ...] | None = None
    # of the final state in bf16: 1e-5 where it is formed in fp32, 2^-8 where it is stored in bf16
    state_rounding: float = 1e-5
    # leading entries of the state that are angles, in [0, 2 pi) like those that come out
    angles: int = 0

    def draw(
        self, batch: int, length: int, states: int | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Random sequences, weights and initial state, all leaves that require gradients."""

        def leaf(name: str, shape: tuple[int, ...]) -> Tensor:
            value = torch.randn(shape, dtype=torch.float64)
            if name == "A":
                value = -4 * torch.rand(shape, dtype=torch.float64)
            elif name == "a":
                value = torch.rand(shape, dtype=torch.float64)
            if self.complex:
                value = value * torch.exp(1j * torch.rand(shape, dtype=torch.float64))
                return value.to(torch.complex128).requires_grad_()
            return value.to(dtype).requires_grad_()

        sequences = {n: leaf(n, (batch, length, *s)) for n, s in self.sequences.items()}
        weights = {n: leaf(n, s) for n, s in self.weights.items()}
        state = leaf("state", (states or batch, *self.state))
        if self.angles:
            state.data[:, : self.angles].abs_()
        return sequences, weights, state


def conv_definition(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, activation: str | None):
    return causal_conv1d_recurrent(x, weight, bias, activation, state, None, None)


def scan_definition(a: Tensor, b: Tensor, state: Tensor):
    return linear_scan_recurrent(a, b, state)


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + (D if D.ndim == x.ndim - 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z)


def _delta(dt: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float]) -> Tensor:
    return F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)


def s6_definition(x, dt, A, B, C, state, D=None, z=None, dt_bias=None, dt_softplus=True,
                  dt_limit=(0.0, float("inf"))):  # fmt: skip
    y, state = selective_scan_recurrent(x, _delta(dt, dt_bias, dt_limit), A, B, C, state, None)
    return _finish(y, x, D, z), state


def ssd_definition(x, dt, A, B, C, state, D=None, z=None, dt_bias=None, dt_softplus=True,
                   dt_limit=(0.0, float("inf")), chunk_size=64):  # fmt: skip
    y, state = ssd_recurrent(x, _delta(dt, dt_bias, dt_limit), A, B, C, state, None)
    return _finish(y, x, D, z), state


class FlatMamba3:
    """mamba3_scan, or its definition, with the four states (B, ...) side by side in one tensor."""

    def __init__(self, run: Callable[..., Any], pairs: int, ranks: int, n: int) -> None:
        self.run = run
        self.shapes = ((H, pairs), (H, P, n), (ranks, H, n), (H, P))

    def split(self, flat: Tensor) -> Mamba3State:
        parts = flat.split([math.prod(shape) for shape in self.shapes], dim=1)
        return Mamba3State(*(v.unflatten(1, s) for v, s in zip(parts, self.shapes, strict=True)))

    def __call__(self, *, initial_state: Tensor | None = None, **inputs: Any) -> Any:
        state = None if initial_state is None else self.split(initial_state)
        out = self.run(**inputs, initial_state=state)
        if isinstance(out, Tensor):
            return out
        y, state = out
        return y, torch.cat([v.flatten(1) for v in state], dim=1)


def mamba3(
    weights: tuple[str, ...],
    *,
    n: int,
    pairs: int,
    ranks: int = 1,
    groups: int = 2,
    z: bool = True,
    trap: bool = True,
    **options: Any,
) -> Case:
    """A case of mamba3_scan with the named weights."""
    shapes = {"dt_bias": (H,), "D": (H,), "B_bias": (H, ranks, n), "C_bias": (H, ranks, n)}
    shapes |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (H, ranks, P))
    sequences = {"x": (H, P), "dt": (H,), "A": (H,), "trap": (H,)}
    sequences |= {"B": (ranks, groups, n), "C": (ranks, groups, n), "angles": (pairs,), "z": (H, P)}
    absent = {name: None for name, there in (("trap", trap), ("angles", pairs)) if not there}
    kept = {s: v for s, v in sequences.items() if s not in absent and (z or s != "z")}
    definition = FlatMamba3(mamba3_scan_recurrent, pairs, ranks, n)

    def define(state: Tensor, chunk_size: int = 0, **inputs: Any) -> tuple[Tensor, Tensor]:
        return definition(initial_state=state, **inputs)

    return Case(
        FlatMamba3(mamba3_scan, pairs, ranks, n),
        define,
        kept,
        {w: shapes[w] for w in weights},
        (sum(math.prod(shape) for shape in definition.shapes),),
        {"dt_softplus": True, **absent, **options},
        output=(ranks, H, P) if ranks > 1 and "mimo_o" not in weights else None,
        state_rounding=2**-8,
        angles=H * pairs,
    )


H, P, G, N, I, K = 4, 3, 2, 5, 6, 4
_S6 = {"x": (I,), "dt": (I,), "B": (N,), "C": (N,)}
_SSD = {"x": (H, P), "dt": (H,), "B": (G, N), "C": (G, N)}
_BIASES = ("dt_bias", "D", "B_bias", "C_bias")
_MIMO = ("mimo_x", "mimo_z", "mimo_o")

CASES = {
    "conv": Case(
        causal_conv1d,
        conv_definition,
        {"x": (I,)},
        {"weight": (I, K), "bias": (I,)},
        (K - 1, I),
        {"activation": "silu"},
        state_rounding=2**-8,
    ),
    "conv-linear-K2": Case(
        causal_conv1d,
        conv_definition,
        {"x": (I,)},
        {"weight": (I, 2), "bias": (I,)},
        (1, I),
        {"activation": None},
        state_rounding=2**-8,
    ),
    "linear_scan": Case(linear_scan, scan_definition, {"a": (I,), "b": (I,)}, {}, (I,)),
    "linear_scan-complex": Case(
        linear_scan, scan_definition, {"a": (I,), "b": (I,)}, {}, (I,), complex=True
    ),
    "selective_scan": Case(
        selective_scan, s6_definition, _S6, {"A": (I, N)}, (I, N), {"dt_softplus": True}
    ),
    "selective_scan-all": Case(
        selective_scan,
        s6_definition,
        {**_S6, "z": (I,)},
        {"A": (I, N), "D": (I,), "dt_bias": (I,)},
        (I, N),
        {"dt_softplus": True, "dt_limit": (0.3, 1.5)},
    ),
    "ssd": Case(
        ssd, ssd_definition, _SSD, {"A": (H,)}, (H, P, N), {"dt_softplus": True, "chunk_size": 4}
    ),
    "ssd-all": Case(
        ssd,
        ssd_definition,
        {**_SSD, "z": (H, P)},
        {"A": (H,), "D": (H, P), "dt_bias": (H,)},
        (H, P, N),
        {"dt_softplus": True, "dt_limit": (0.3, 1.5), "chunk_size": 16},
    ),
    "ssd-D-per-head": Case(
        ssd,
        ssd_definition,
        _SSD,
        {"A": (H,), "D": (H,)},
        (H, P, N),
        {"dt_softplus": True, "chunk_size": 256},
    ),
    "mamba3": mamba3((), n=5, pairs=2, z=False, chunk_size=4),
    "mamba3-half": mamba3(_BIASES, n=6, pairs=3, rope_layout="half", chunk_size=16),
    "mamba3-plain": mamba3(_BIASES, n=5, pairs=0, groups=4, trap=False),
    "mamba3-mimo2": mamba3((*_BIASES, *_MIMO), n=6, pairs=3, ranks=2, groups=1, chunk_size=8),
    "mamba3-mimo4": mamba3((*_BIASES, *_MIMO), n=8, pairs=2, ranks=4, rope_layout="half"),
    "mamba3-per-rank": mamba3((*_BIASES, "mimo_x"), n=6, pairs=2, ranks=2, z=False),
}


def document_by_document(
    case: Case,
    sequences: dict[str, Tensor],
    weights: dict[str, Tensor],
    state: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What an operator must return: y with 0 at pads, and the state of each row's last document."""
    first = next(iter(sequences.values()))
    batch, length = first.shape[:2]
    outputs, states = [], []
    for row in range(batch):
        zeros = torch.zeros(1, *case.state, dtype=first.dtype)
        current = zeros if state is None else state[row : row + 1]
        real = [t for t in range(length) if mask is None or mask[row, t]]
        documents: list[list[int]] = []
        for t in real:
            new = (
                seq_idx is not None
                and documents
                and seq_idx[row, t] != seq_idx[row, documents[-1][-1]]
            )
            if new or not documents:
                documents.append([])
            documents[-1].append(t)
        pieces: dict[int, Tensor] = {}
        for number, tokens in enumerate(documents):
            if number:
                current = zeros
            part = {n: s[row : row + 1, tokens] for n, s in sequences.items()}
            y, current = case.definition(**part, **weights, **case.options, state=current)
            pieces.update(zip(tokens, y[0], strict=True))
        empty = first.new_zeros(case.output or first.shape[2:])
        outputs.append(torch.stack([pieces.get(t, empty) for t in range(length)]))
        states.append(current[0])
    return torch.stack(outputs), torch.stack(states)
