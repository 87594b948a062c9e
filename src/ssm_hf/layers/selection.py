"""Which tokens attend: the gate of selective attention, and the budget that it is held to."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mixer import Initialization, Sublayer, reset_linear
from ssm_hf.ops.packing import compute_dtype, in_given_precision

Estimator = Literal["dense", "sparse", "paper"]
ESTIMATORS: tuple[Estimator, ...] = ("dense", "sparse", "paper")
# Initial weights of a gate: it begins by selecting about half of all tokens, whatever they are.
_GATE_STD = 0.02


class Gate(NamedTuple):
    """What a gate has decided about (B, T) tokens; fp32 or wider, pads are never selected.

    Attributes:
        selected: bool, which tokens attend.
        weight: 1.0 at selected tokens and 0.0 at others; gradients flow as through a probability.
        alpha: share of the attention's output in what a selected token becomes.
        margin: score for attending less score against, without noise.
    """

    selected: Tensor
    weight: Tensor
    alpha: Tensor
    margin: Tensor


class SelectionGate(Sublayer):
    """x -> two scores a token, s = weight f(x) + bias, with f the identity or silu(hidden(x)).

    In training a token is selected where (s_1 + g_1) / tau > (s_0 + g_0) / tau, g from Gumbel's
    distribution; otherwise where s_1 - s_0 > threshold. Ties are not selected.

    Args:
        hidden_size: D.
        inner_size: width of `hidden`; None = there is none.
        estimator: `"paper"` takes for the gradient of the choice that of the chosen class's
            probability, others that of being selected.
        threshold: see above.

    Attributes:
        is_open: in training every real token is selected, and alpha alone learns from the loss.

    Source: Nguyen et al. 2024, "Taipan"; Jang et al. 2017 (Gumbel softmax, straight through).
    """

    no_decay: ClassVar[tuple[str, ...]] = ("bias",)
    threshold: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int | None,
        estimator: Estimator,
        threshold: float,
    ) -> None:
        super().__init__()
        self.estimator = estimator
        self.is_open = False
        self.initial_threshold = threshold
        self.hidden = None
        if inner_size is not None:
            self.hidden = Linear(hidden_size, inner_size, bias=True)
        width = hidden_size if inner_size is None else inner_size
        self.weight = nn.Parameter(torch.empty(2, width))
        self.bias = nn.Parameter(torch.empty(2))
        # A tensor, so that captured steps see it change; rounded, it would turn choices.
        exact = torch.tensor(float(threshold), dtype=torch.float32)
        self.register_buffer("threshold", exact, persistent=False)
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values; the gate's own are the same in every scheme."""
        if self.hidden is not None:
            reset_linear(self.hidden, scheme, std)
        init.normal_(self.weight, std=_GATE_STD)
        init.zeros_(self.bias)
        init.constant_(self.threshold, self.initial_threshold)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelectionGate":
        """Moves and casts as of any module, but the threshold stays in fp32 or wider."""
        exact = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype.itemsize < torch.float32.itemsize:
            self.threshold = exact.to(self.threshold.device, torch.float32)
        return self

    def flops_per_token(self, sequence_length: int) -> int:
        """The products."""
        inner = 0 if self.hidden is None else self.hidden.weight.numel()
        return 2 * (inner + self.weight.numel())

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        tau: Tensor | float = 1.0,
    ) -> Gate:
        """x (B, T, D), mask (B, T) True at real tokens, noise (B, T) = g_1 - g_0 in training."""
        features = x if self.hidden is None else F.silu(self.hidden(x))
        scores = _scores(features, self.weight, self.bias)
        alpha = scores.softmax(dim=-1)[..., 1]
        margin = scores[..., 1] - scores[..., 0]
        if not self.training:
            selected = margin > self.threshold
            weight = selected.to(margin.dtype)
        elif self.is_open:
            weight = torch.ones_like(margin)
            selected = weight.bool()
        else:
            z = (margin if noise is None else margin + noise.to(margin.dtype)) / tau
            selected = z > 0
            chosen = torch.sigmoid(z)
            if self.estimator == "paper":
                chosen = torch.where(selected, chosen, 1 - chosen)
            weight = selected.to(margin.dtype) + (chosen - chosen.detach())
        if mask is not None:
            selected, weight = selected & mask, weight * mask
        return Gate(selected, weight, alpha, margin)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.weight.shape[1]}, estimator={self.estimator}"


@in_given_precision
def _scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The scores in fp32 or wider, under autocast too: rounded ones would turn choices."""
    dtype = compute_dtype(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def gumbel_difference(shape: Sequence[int], device: torch.device) -> Tensor:
    """g_1 - g_0 of two independent Gumbel variables for each token, fp32."""
    drawn = torch.empty(2, *shape, device=device, dtype=torch.float32).exponential_()
    return drawn[0].log() - drawn[1].log()


def gate_fractions(gates: Sequence[Gate], mask: Tensor | None) -> Tensor:
    """Share of the real tokens that each of n gates selects, (n,) fp32."""
    return torch.stack([_share(gate.selected.float(), mask, whole=True) for gate in gates])


def capacity_loss(
    gates: Sequence[Gate],
    mask: Tensor | None,
    capacity: float,
    reduction: Literal["sequence", "batch"],
) -> Tensor:
    """sum over gates of (capacity - share of the real tokens that is selected)².

    Args:
        gates: of all layers with selective attention.
        mask: (B, T), True at real tokens.
        capacity: C.
        reduction: `"sequence"` squares for each row and takes the mean over rows that hold a real
            token, `"batch"` takes the share over all rows.

    Source: Nguyen et al. 2024, equation of the constraint.
    """
    losses = []
    for gate in gates:
        share = _share(gate.weight, mask, whole=reduction == "batch")
        losses.append((capacity - share).square())
    total = torch.stack(losses).sum(dim=0)
    if reduction == "batch":
        return total
    if mask is None:
        return total.mean()
    filled = mask.any(dim=1)
    return (total * filled).sum() / filled.sum().clamp(min=1)


def _share(weight: Tensor, mask: Tensor | None, whole: bool) -> Tensor:
    """Mean of the weight (B, T), 0 at pads, over the real tokens: of each row, or of all."""
    if mask is None:
        return weight.mean() if whole else weight.mean(dim=1)
    if whole:
        return weight.sum() / mask.sum().clamp(min=1)
    return weight.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
