"""Mamba-1's mixer (Gu and Dao 2023)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.cache import RecurrentCache, RecurrentLayer, State
from ssm_hf.layers.init import dt_bias_values
from ssm_hf.layers.linear import Linear, linear_dtype
from ssm_hf.layers.mixer import (
    CausalConv1d,
    Initialization,
    Mixer,
    StepProjection,
    all_plain,
    is_plain_step,
    norm_and_in_proj,
    recorded_mask,
    replayed_window,
    reset_conv,
    reset_linear,
    reset_out_proj,
    with_state,
)
from ssm_hf.layers.norm import ResidualNorm, RMSNorm
from ssm_hf.ops import selective_scan
from ssm_hf.ops.causal_conv1d.step import causal_conv1d_step_
from ssm_hf.ops.mamba1_mix import mamba1_mix
from ssm_hf.ops.norm_linear import few_rows, norm_linear
from ssm_hf.ops.packing import compute_dtype
from ssm_hf.ops.rows_linear import rows_linear, shares_linear, some_rows
from ssm_hf.ops.selective_scan.step import mamba1_step
from ssm_hf.sequence import SequenceInfo


class Mamba1Mixer(Mixer):
    """[x | z] = in_proj(u); x = silu(conv(x)); [δ | B | C] = x_proj(x); out_proj(scan(x) silu(z)).

    Args:
        hidden_size: D.
        inner_size: I.
        state_size: N.
        conv_kernel: K.
        time_step_rank: R, rank of the step projection.
        time_step_min, time_step_max, time_step_floor, time_step_scale, time_step_init_scheme:
            initial step sizes.
        use_bias: biases of in_proj and out_proj.
        use_conv_bias: bias of the convolution.
        inner_norm_eps: of RMS norms of δ, B and C (Jamba's `dt_layernorm`, `b_layernorm` and
            `c_layernorm`); None = no norms.
        layer_idx: place in the cache.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D")

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int,
        state_size: int,
        conv_kernel: int,
        time_step_rank: int,
        time_step_min: float,
        time_step_max: float,
        time_step_floor: float,
        time_step_scale: float,
        time_step_init_scheme: str,
        use_bias: bool,
        use_conv_bias: bool,
        inner_norm_eps: float | None,
        layer_idx: int,
    ) -> None:
        super().__init__(layer_idx)
        self.hidden_size = hidden_size
        self.inner_size = inner_size
        self.state_size = state_size
        self.conv_kernel = conv_kernel
        self.time_step_rank = time_step_rank
        self.time_step = (time_step_min, time_step_max, time_step_floor)
        self.time_step_scale = time_step_scale
        self.time_step_init_scheme = time_step_init_scheme
        self.conv1d = CausalConv1d(inner_size, conv_kernel, bias=use_conv_bias)
        self.in_proj = Linear(hidden_size, 2 * inner_size, bias=use_bias)
        self.x_proj = Linear(inner_size, time_step_rank + 2 * state_size, bias=False)
        self.dt_proj = StepProjection(time_step_rank, inner_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner_size, state_size))
        self.D = nn.Parameter(torch.empty(inner_size))
        self.out_proj = Linear(inner_size, hidden_size, bias=use_bias)
        self.dt_layernorm = self.b_layernorm = self.c_layernorm = None
        if inner_norm_eps is not None:
            self.dt_layernorm = RMSNorm(time_step_rank, eps=inner_norm_eps)
            self.b_layernorm = RMSNorm(state_size, eps=inner_norm_eps)
            self.c_layernorm = RMSNorm(state_size, eps=inner_norm_eps)
        # A mixer used outside a model is initialised too; a model draws again, by its config.
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values (Gu and Dao 2023, section 3.6)."""
        for linear in (self.in_proj, self.x_proj):
            reset_linear(linear, scheme, std)
        reset_conv(self.conv1d, scheme)
        reset_out_proj(self.out_proj, num_residual_layers)
        bound = self.time_step_scale * self.time_step_rank**-0.5
        if self.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, bound)
        else:
            init.uniform_(self.dt_proj.weight, -bound, bound)
        device = self.A_log.device
        init.copy_(self.dt_proj.bias, dt_bias_values(self.inner_size, *self.time_step, device))
        # The real part of S4D-Lin: -1 ... -N for every channel.
        rates = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=device)
        init.copy_(self.A_log, rates.log().expand(self.inner_size, -1))
        init.ones_(self.D)
        for norm in (self.dt_layernorm, self.b_layernorm, self.c_layernorm):
            if norm is not None:
                norm.reset_parameters()

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The last K-1 inputs of the convolution, and h."""
        return {
            "conv_state": (batch, self.conv_kernel - 1, self.inner_size),
            "ssm_state": (batch, self.inner_size, self.state_size),
        }

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, convolution, and 9 operations for each of the I x N states."""
        inner, rank, states = self.inner_size, self.time_step_rank, self.state_size
        linear = 3 * self.hidden_size * inner + inner * (rank + 2 * states) + rank * inner
        return 2 * linear + 2 * self.conv_kernel * inner + 9 * inner * states

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        """Mix x (B, T, D); with a cache, continue from its state and update it."""
        proj = self.in_proj(x)
        hidden, z = proj.chunk(2, dim=-1)
        layer, state = self._layer(past_key_values, hidden)
        if layer is not None and is_plain_step(x, seq, layer) and all_plain(self.conv1d):
            return self.out_proj(self._step(hidden[:, 0], z[:, 0], layer)[:, None])
        if layer is None and self._can_mix(proj.dtype):
            return self._mix(proj, seq)
        conv_in = hidden
        keep = layer is not None
        hidden, conv_state = self.conv1d(hidden, seq, state.get("conv_state"), keep)
        low, B, C = self._parts(self.x_proj(hidden))
        # A scan adds the bias as it reads; a projection that carries anything is called as it is.
        if all_plain(self.dt_proj):
            dt, dt_bias = self.dt_proj(low, add_bias=False), self.dt_proj.bias
        else:
            dt, dt_bias = self.dt_proj(low), None
        A = -torch.exp(self.A_log.to(compute_dtype(self.A_log)))
        scanned = selective_scan(
            hidden,
            dt,
            A,
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_state=state.get("ssm_state"),
            seq_idx=seq.seq_idx,
            mask=seq.mask,
            return_final_state=keep,
        )
        y, ssm_state = with_state(scanned)
        if layer is not None:
            if layer.record_past:
                inputs = {"conv_in": conv_in, "x": hidden, "dt": dt, "B": B}
                inputs["mask"] = recorded_mask(seq, x)
                constants = {"A": A, **self.conv1d.replay_constants(conv_in)}
                if dt_bias is not None:
                    constants["dt_bias"] = dt_bias
                layer.record(_replay, inputs, constants)
            layer.write({"conv_state": conv_state, "ssm_state": ssm_state})
        return self.out_proj(y)

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """δ, B and C in projected (..., R + 2 N), normed if so asked."""
        low, B, C = projected.split([self.time_step_rank, self.state_size, self.state_size], dim=-1)
        if self.dt_layernorm is None or self.b_layernorm is None or self.c_layernorm is None:
            return low, B, C
        return self.dt_layernorm(low), self.b_layernorm(B), self.c_layernorm(C)

    def residual_pass(
        self, update: Tensor, stream: Tensor | None, norm: nn.Module, seq: SequenceInfo
    ) -> tuple[Tensor, Tensor] | None:
        """Two operators: norm and in_proj, and everything after it."""
        can_mix = self._can_mix(linear_dtype(self.in_proj.weight))
        projected = can_mix and norm_and_in_proj(update, stream, norm, self.in_proj)
        return (self._mix(projected[0], seq), projected[1]) if projected else None

    def _can_mix(self, dtype: torch.dtype) -> bool:
        """Whether nothing inside carries more than its weight, and all compute in `dtype`."""
        inside = (self.x_proj, self.dt_proj)
        return (
            self.dt_layernorm is None
            and all_plain(self.conv1d, *inside)
            and all(linear_dtype(m.weight) == dtype for m in inside)
        )

    def _mix(self, proj: Tensor, seq: SequenceInfo) -> Tensor:
        """Everything after in_proj, from no state to none, as one operator."""
        conv, out = self.conv1d, self.out_proj
        whole = all_plain(out) and linear_dtype(out.weight) == proj.dtype
        mixed = mamba1_mix(
            proj,
            conv.weight.squeeze(1),
            conv.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -torch.exp(self.A_log.to(compute_dtype(self.A_log))),
            self.D,
            out.weight if whole else None,
            out.bias if whole else None,
            seq_idx=seq.seq_idx,
            mask=seq.mask,
            real_first=seq.real_first,
        )
        return mixed if whole else out(mixed)

    def _step(self, x: Tensor, z: Tensor, layer: RecurrentLayer) -> Tensor:
        """Everything between the outer projections for one token, x, z (B, I) -> (B, I)."""
        conv = self.conv1d
        x = causal_conv1d_step_(x, layer.state["conv_state"], conv.weight[:, 0], conv.bias)
        low, B, C = self._parts(self.x_proj(x))
        if all_plain(self.dt_proj):
            dt, dt_bias = self.dt_proj(low, add_bias=False), self.dt_proj.bias
        else:
            dt, dt_bias = self.dt_proj(low), None
        h = layer.state["ssm_state"]
        return mamba1_step(x, dt, B, C, z, h, A_log=self.A_log, D=self.D, dt_bias=dt_bias)

    def residual_step(
        self,
        update: Tensor,
        stream: Tensor | None,
        norm: nn.Module,
        past_key_values: RecurrentCache,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Of one or two rows four kernels: norm, in_proj and convolution; x_proj; dt_proj and scan;
        out_proj, sum. Of some rows six: norm; in_proj and convolution; x_proj; dt_proj; the scan;
        out_proj."""
        some = (
            some_rows(update, self.in_proj.weight)
            and self.out_proj.bias is None
            and self.dt_layernorm is None
        )
        if not (
            type(norm) is ResidualNorm
            and (some or few_rows(update, self.in_proj.weight))
            and all_plain(norm, self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        ):
            return None
        batch = update.new_empty(update.shape[-3], 0, dtype=self.in_proj.weight.dtype)
        layer, state = self._layer(past_key_values, batch)
        if not is_plain_step(update if update.ndim == 3 else update[0], SequenceInfo(), layer):
            return None
        conv = {
            "conv_state": state["conv_state"],
            "conv_weight": self.conv1d.weight[:, 0],
            "conv_bias": self.conv1d.bias,
        }
        if some:
            normed, stream = norm(update, stream)
            return self._rows_step(normed[:, 0], state["ssm_state"], conv), stream
        x = update if stream is None else stream + update
        proj = norm_linear(
            x[:, 0],
            self.in_proj.weight,
            self.in_proj.bias,
            norm_weight=norm.weight,
            eps=norm.eps,
            **conv,
            out_dtype=torch.float32,
            overlap=True,
        )
        hidden, z = proj.chunk(2, dim=-1)
        low, B, C = self._parts(norm_linear(hidden, self.x_proj.weight, overlap=True))
        y = mamba1_step(
            hidden,
            low,
            B,
            C,
            z,
            state["ssm_state"],
            A_log=self.A_log,
            D=self.D,
            dt_weight=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            overlap=True,
        )
        y = norm_linear(y, self.out_proj.weight, self.out_proj.bias, residual=x[:, 0], overlap=True)
        return y[:, None], None

    def _rows_step(self, normed: Tensor, state: Tensor, conv: dict[str, Any]) -> Tensor:
        """Shares (S, B, 1, D) of the output for normed rows (B, D); the states change in place."""
        proj = rows_linear(normed, self.in_proj.weight, self.in_proj.bias, **conv, overlap=True)
        hidden, z = proj.chunk(2, dim=-1)
        shares = rows_linear(hidden, self.x_proj.weight, shares=True, overlap=True)
        dt, rest = shares_linear(shares, self.dt_proj.weight, overlap=True)
        B, C = rest.chunk(2, dim=-1)
        y = mamba1_step(
            hidden,
            dt,
            B,
            C,
            z,
            state,
            A_log=self.A_log,
            D=self.D,
            dt_bias=self.dt_proj.bias,
            overlap=True,
        )
        return rows_linear(y, self.out_proj.weight, shares=True, overlap=True)[:, :, None]


def _replay(state: State, inputs: dict[str, Tensor], constants: dict[str, Tensor]) -> State:
    """State after the recorded tokens; only states are of use, so C is any tensor of B's shape."""
    _, ssm_state = selective_scan(
        inputs["x"],
        inputs["dt"],
        constants["A"],
        inputs["B"],
        inputs["B"],
        dt_bias=constants.get("dt_bias"),
        dt_softplus=True,
        initial_state=state.get("ssm_state"),
        mask=inputs["mask"],
        return_final_state=True,
    )
    return {"conv_state": replayed_window(state, inputs, constants), "ssm_state": ssm_state}
