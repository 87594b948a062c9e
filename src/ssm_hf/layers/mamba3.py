"""Mamba-3's mixer (Lahoti et al. 2026): a trapezoidal rule, rotating states, streams of heads."""

import functools
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.cache import RecurrentCache, RecurrentLayer, State
from ssm_hf.layers.init import dt_bias_values
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mixer import (
    Initialization,
    Mixer,
    all_plain,
    is_plain_step,
    norm_and_in_proj,
    recorded_mask,
    reset_linear,
    reset_out_proj,
)
from ssm_hf.layers.norm import ResidualNorm, RMSNorm
from ssm_hf.ops import mamba3_scan
from ssm_hf.ops.mamba3_scan import Mamba3State
from ssm_hf.ops.mamba3_scan.step import decay_rates, mamba3_mix_step
from ssm_hf.ops.norm_linear import few_rows, norm_linear
from ssm_hf.ops.step_size import step_size
from ssm_hf.sequence import SequenceInfo


class Mamba3Mixer(Mixer):
    """[z | x | B | C | dt | a | trap | angles] = in_proj(u); out_proj(scan, gated by z).

    B and C are normed and biased and rotate by the running sum of the angles; see
    `ssm_hf.ops.mamba3_scan`. There is no convolution.

    Args:
        hidden_size: D.
        num_heads: H; I = H P.
        head_dim: P.
        state_size: N.
        n_groups: G.
        mimo_rank: R, streams of each head; with 1 there are no mimo_x, mimo_z and mimo_o.
        num_angles: S, pairs of states that rotate; 0 = none.
        rope_layout: `"pairwise"` or `"half"`.
        A_activation: of the rates, `"heavy_tail"` (1 + a above 0, 1 / (1 - a) below, which falls
            more slowly than an exponential) or `"softplus"`.
        A_floor: no rate is slower than this.
        trapezoid: False leaves out the token before (exponential-Euler rule).
        bc_bias: biases of B and C.
        chunk_size: longest chunk of the chunked scan.
        time_step_min, time_step_max, time_step_floor: initial step sizes.
        norm_eps: of the norms of B and C, and of the output norm.
        output_norm: norm of each head's (and stream's) output, before the gate.
        use_bias: biases of in_proj and out_proj.
        layer_idx: place in the cache.
    """

    # Decay would pull B's and C's biases and the streams' weights away from 1, which they start
    # with and need (zero biases cost 5 % perplexity in the paper).
    no_decay: ClassVar[tuple[str, ...]] = (
        *("D", "dt_bias", "B_bias", "C_bias"),
        *("mimo_x", "mimo_z", "mimo_o"),
    )

    B_bias: nn.Parameter | None
    C_bias: nn.Parameter | None
    mimo_x: nn.Parameter | None
    mimo_z: nn.Parameter | None
    mimo_o: nn.Parameter | None
    norm: RMSNorm | None

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        n_groups: int,
        mimo_rank: int,
        num_angles: int,
        rope_layout: str,
        A_activation: str,
        A_floor: float,
        trapezoid: bool,
        bc_bias: bool,
        chunk_size: int,
        time_step_min: float,
        time_step_max: float,
        time_step_floor: float,
        norm_eps: float,
        output_norm: bool,
        use_bias: bool,
        layer_idx: int,
    ) -> None:
        super().__init__(layer_idx)
        check_mamba3(
            num_heads=num_heads,
            state_size=state_size,
            n_groups=n_groups,
            mimo_rank=mimo_rank,
            num_angles=num_angles,
            rope_layout=rope_layout,
            A_activation=A_activation,
            A_floor=A_floor,
        )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.state_size = state_size
        self.n_groups = n_groups
        self.mimo_rank = mimo_rank
        self.num_angles = num_angles
        self.rope_layout = rope_layout
        self.A_activation = A_activation
        self.A_floor = A_floor
        self.chunk_size = chunk_size
        self.time_step = (time_step_min, time_step_max, time_step_floor)
        inner, grouped = num_heads * head_dim, mimo_rank * n_groups * state_size
        self.sizes = [
            *(inner, inner, grouped, grouped, num_heads, num_heads),
            *(num_heads if trapezoid else 0, num_angles),
        ]
        self.in_proj = Linear(hidden_size, sum(self.sizes), bias=use_bias)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.B_norm = RMSNorm(state_size, eps=norm_eps)
        self.C_norm = RMSNorm(state_size, eps=norm_eps)
        per_stream = (num_heads, mimo_rank)
        for name, shape, wanted in (
            ("B_bias", (*per_stream, state_size), bc_bias),
            ("C_bias", (*per_stream, state_size), bc_bias),
            ("mimo_x", (*per_stream, head_dim), mimo_rank > 1),
            ("mimo_z", (*per_stream, head_dim), mimo_rank > 1),
            ("mimo_o", (*per_stream, head_dim), mimo_rank > 1),
        ):
            value = nn.Parameter(torch.empty(shape)) if wanted else None
            self.register_parameter(name, value)
        self.D = nn.Parameter(torch.empty(num_heads))
        self.norm = None
        if output_norm:
            self.norm = RMSNorm(inner, eps=norm_eps, group_size=head_dim, norm_before_gate=True)
        self.out_proj = Linear(inner, hidden_size, bias=use_bias)
        # A mixer used outside a model is initialised too; a model draws again, by its config.
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values."""
        reset_linear(self.in_proj, scheme, std)
        reset_out_proj(self.out_proj, num_residual_layers)
        bias = dt_bias_values(self.num_heads, *self.time_step, self.dt_bias.device)
        init.copy_(self.dt_bias, bias)
        for name in ("B_bias", "C_bias", "mimo_z", "D"):
            if getattr(self, name) is not None:
                init.ones_(getattr(self, name))
        for name in ("mimo_x", "mimo_o"):
            if getattr(self, name) is not None:
                init.constant_(getattr(self, name), 1 / self.mimo_rank)
        for norm in (self.B_norm, self.C_norm, self.norm):
            if norm is not None:
                norm.reset_parameters()

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The last angles, S, and the last k and x, which weigh in the next token's step."""
        heads, head_dim, states = self.num_heads, self.head_dim, self.state_size
        shapes: dict[str, tuple[int, ...]] = {
            "angle_state": (batch, heads, self.num_angles),
            "ssm_state": (batch, heads, head_dim, states),
            "k_state": (batch, self.mimo_rank, heads, states),
            "v_state": (batch, heads, head_dim),
        }
        if not self.num_angles:
            del shapes["angle_state"]
        return shapes

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, rotation, and the scan in its chunked form.

        The scan's matrix products are between the R Q rows of a chunk of Q tokens, for each head,
        for rotated B and C differ from head to head: scores, scores times x, states, and outputs
        from states.
        """
        linear = self.in_proj.in_features * self.in_proj.out_features
        linear += self.out_proj.in_features * self.out_proj.out_features
        heads, head_dim, states, rank = (
            *(self.num_heads, self.head_dim, self.state_size, self.mimo_rank),
        )
        rows = rank * min(self.chunk_size, max(1, _ROWS // rank))
        products = heads * rank * (rows * (states + head_dim) + 2 * head_dim * states)
        rotation = heads * rank * 4 * self.num_angles
        streams = 3 * heads * rank * head_dim if rank > 1 else 0
        return 2 * (linear + products + rotation + streams)

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        """Mix x (B, T, D); with a cache, continue from its state and update it."""
        return self._rest(self.in_proj(x), seq, past_key_values)

    def residual_pass(
        self, update: Tensor, stream: Tensor | None, norm: nn.Module, seq: SequenceInfo
    ) -> tuple[Tensor, Tensor] | None:
        """Norm and in_proj as one operator, and everything after it."""
        projected = norm_and_in_proj(update, stream, norm, self.in_proj)
        return (self._rest(projected[0], seq, None), projected[1]) if projected else None

    def _rest(
        self, proj: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None
    ) -> Tensor:
        """Everything after in_proj."""
        z, hidden, B, C, dt, a, trap, angles = proj.split(self.sizes, dim=-1)
        layer, state = self._layer(past_key_values, hidden)
        if layer is not None and is_plain_step(proj, seq, layer) and self._is_plain():
            return self.out_proj(self._step(proj[:, 0], layer)[:, None])
        z, hidden = (v.unflatten(-1, (self.num_heads, self.head_dim)) for v in (z, hidden))
        grouped = (self.mimo_rank, self.n_groups, self.state_size)
        B = self.B_norm(B.unflatten(-1, grouped))
        C = self.C_norm(C.unflatten(-1, grouped))
        A = decay_rates(a, self.A_activation, self.A_floor)
        some_trap = trap if trap.shape[-1] else None
        some_angles = angles if self.num_angles else None
        plain = self.norm is None
        scanned = mamba3_scan(
            hidden,
            dt,
            A,
            some_trap,
            B,
            C,
            some_angles,
            D=self.D,
            z=z if plain else None,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            mimo_z=self.mimo_z if plain else None,
            mimo_o=self.mimo_o if plain else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            rope_layout=self.rope_layout,
            initial_state=_as_scan_state(state) if state else None,
            seq_idx=seq.seq_idx,
            mask=seq.mask,
            return_final_state=layer is not None,
            chunk_size=self.chunk_size,
        )
        y, final = scanned if isinstance(scanned, tuple) else (scanned, None)
        if not plain:
            y = self._norm_and_gate(y, z)
        if layer is not None and final is not None:
            if layer.record_past:
                inputs = {"x": hidden, "B": B, "A": A, "mask": recorded_mask(seq, proj)}
                inputs["dt"] = step_size(dt, self.dt_bias, True, (0.0, float("inf")), None)
                inputs |= {} if some_trap is None else {"trap": trap}
                inputs |= {} if some_angles is None else {"angles": angles}
                layer.record(_REPLAYS[self.rope_layout], inputs, self._replay_constants())
            layer.write({name: t for name, t in zip(_STATES, final, strict=True) if t.numel()})
        return self.out_proj(y.flatten(2))

    def _is_plain(self) -> bool:
        """Whether the norms between the projections are no more than their weights."""
        return all_plain(self.B_norm, self.C_norm, self.norm)

    def _step(self, proj: Tensor, layer: RecurrentLayer, overlap: bool = False) -> Tensor:
        """Everything between the projections for one token, proj (B, in_size) -> (B, I)."""
        state = _as_scan_state(layer.state)
        return mamba3_mix_step(
            proj,
            *state,
            layer.tickets(proj.shape[0], self.num_heads, proj.device),
            B_norm_weight=self.B_norm.weight,
            C_norm_weight=self.C_norm.weight,
            norm_eps=self.B_norm.eps,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            dt_bias=self.dt_bias,
            D=self.D,
            mimo_x=self.mimo_x,
            mimo_z=self.mimo_z,
            mimo_o=self.mimo_o,
            norm_weight=None if self.norm is None else self.norm.weight,
            n_groups=self.n_groups,
            rope_layout=self.rope_layout,
            A_floor=self.A_floor,
            A_activation=self.A_activation,
            trapezoid=self.sizes[6] > 0,
            overlap=overlap,
        )

    def residual_step(
        self,
        update: Tensor,
        stream: Tensor | None,
        norm: nn.Module,
        past_key_values: RecurrentCache,
    ) -> tuple[Tensor, None] | None:
        """Three kernels: norm and in_proj; the scan; out_proj and sum."""
        if not (
            type(norm) is ResidualNorm
            and few_rows(update, self.in_proj.weight)
            and all_plain(norm, self.in_proj, self.out_proj)
            and self._is_plain()
        ):
            return None
        layer, _ = self._layer(past_key_values, update[:, :0].to(self.in_proj.weight.dtype))
        if layer is None or not is_plain_step(update, SequenceInfo(), layer):
            return None
        x = (update if stream is None else stream + update)[:, 0]
        proj = norm_linear(
            x,
            self.in_proj.weight,
            self.in_proj.bias,
            norm_weight=norm.weight,
            eps=norm.eps,
            out_dtype=torch.float32,
            overlap=True,
        )
        y = self._step(proj, layer, overlap=True)
        out = self.out_proj
        y = norm_linear(y, out.weight, out.bias, residual=x, overlap=True)
        return y[:, None], None

    def _norm_and_gate(self, y: Tensor, z: Tensor) -> Tensor:
        """y (B, T, H, P), or (B, T, R, H, P) of several streams, normed and then gated by z."""
        assert self.norm is not None
        if self.mimo_x is None or self.mimo_z is None or self.mimo_o is None:
            return self.norm(y.flatten(-2), z.flatten(-2))
        gate = z[:, :, None] * self.mimo_z.transpose(0, 1)
        streams = self.norm(y.flatten(-2), gate.flatten(-2))
        summed = (streams.view_as(y) * self.mimo_o.transpose(0, 1)).sum(dim=2)
        return summed.to(z.dtype)

    def _replay_constants(self) -> dict[str, Tensor]:
        """What the state depends on beside the tokens."""
        given = {"B_bias": self.B_bias, "mimo_x": self.mimo_x}
        return {name: value for name, value in given.items() if value is not None}


def check_mamba3(
    *,
    num_heads: int,
    state_size: int,
    n_groups: int,
    mimo_rank: int,
    num_angles: int,
    rope_layout: str | None,
    A_activation: str,
    A_floor: float,
) -> None:
    """Raise `ValueError` where the options of a `Mamba3Mixer` do not fit one another."""
    if mimo_rank < 1:
        raise ValueError(f"mimo_rank must be at least 1, got {mimo_rank}")
    if n_groups < 1 or num_heads % n_groups:
        raise ValueError(f"n_groups={n_groups} does not divide num_heads={num_heads}")
    for name, value, choices in (
        ("A_activation", A_activation, ("heavy_tail", "softplus")),
        ("rope_layout", rope_layout, ("pairwise", "half")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")
    if not 0 <= A_floor < math.inf:
        raise ValueError(f"A_floor must be 0 or more, and finite, got {A_floor}")
    if not 0 <= 2 * num_angles <= state_size:
        raise ValueError(f"num_angles={num_angles} pairs do not fit into {state_size=}")
    if num_angles and rope_layout == "half" and state_size % 2:
        raise ValueError(f'rope_layout="half" needs an even state_size, got {state_size}')


# Rows of a chunk, R a token, that its cost is counted for.
_ROWS = 64
# Names of the operator's four states in a cache.
_STATES = ("angle_state", "ssm_state", "k_state", "v_state")


def _as_scan_state(state: State) -> Mamba3State:
    ssm = state["ssm_state"]
    angle = state.get("angle_state")
    return Mamba3State(
        ssm.new_zeros(*ssm.shape[:2], 0) if angle is None else angle,
        *(state[name] for name in _STATES[1:]),
    )


def _replay(
    rope_layout: str, state: State, inputs: dict[str, Tensor], constants: dict[str, Tensor]
) -> State:
    """State after the recorded tokens; only states are of use, so C is any tensor of B's shape."""
    _, final = mamba3_scan(
        inputs["x"],
        inputs["dt"],
        inputs["A"],
        inputs.get("trap"),
        inputs["B"],
        inputs["B"],
        inputs.get("angles"),
        B_bias=constants.get("B_bias"),
        mimo_x=constants.get("mimo_x"),
        rope_layout=rope_layout,
        initial_state=_as_scan_state(state) if state else None,
        mask=inputs["mask"],
        return_final_state=True,
    )
    return {name: t for name, t in zip(_STATES, final, strict=True) if t.numel()}


_REPLAYS = {layout: functools.partial(_replay, layout) for layout in ("pairwise", "half")}
