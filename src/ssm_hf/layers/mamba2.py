"""Mamba-2's mixer (Dao and Gu 2024)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.cache import RecurrentCache, RecurrentLayer, State
from ssm_hf.layers.init import dt_bias_values, log_uniform_values
from ssm_hf.layers.linear import Linear, linear_dtype
from ssm_hf.layers.mixer import (
    CausalConv1d,
    Initialization,
    Mixer,
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
from ssm_hf.ops import ssd
from ssm_hf.ops.mamba2_mix import mamba2_mix
from ssm_hf.ops.norm_linear import few_rows, norm_linear
from ssm_hf.ops.packing import compute_dtype
from ssm_hf.ops.rows_linear import rows_linear, some_rows
from ssm_hf.ops.ssd.step import mamba2_step, squares_of_rows
from ssm_hf.ops.step_size import step_size
from ssm_hf.sequence import SequenceInfo


class Mamba2Mixer(Mixer):
    """[z | x | B | C | dt] = in_proj(u); x, B, C through silu(conv); out_proj(norm(scan, gate z)).

    Args:
        hidden_size: D.
        inner_size: I; in_proj and out_proj carry this width.
        num_heads: H; the scan covers d_ssm = H * P channels. Where that is less than I, the
            remaining channels are a gated MLP, whose two halves come first in in_proj.
        head_dim: P.
        state_size: N.
        n_groups: G.
        conv_kernel: K.
        chunk_size: longest chunk of the chunked scan.
        time_step_min, time_step_max, time_step_floor: initial step sizes.
        time_step_limit: bounds of the step size, in scan and step alike.
        norm_eps: of the gated norm; None = no norm, the scan is gated alone.
        norm_before_gate: norm(y) silu(z) in place of norm(y silu(z)).
        D_per_channel: D has shape (H * P) in place of (H).
        use_bias: biases of in_proj and out_proj.
        use_conv_bias: bias of the convolution.
        layer_idx: place in the cache.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        n_groups: int,
        conv_kernel: int,
        chunk_size: int,
        time_step_min: float,
        time_step_max: float,
        time_step_floor: float,
        time_step_limit: tuple[float, float],
        norm_eps: float | None,
        norm_before_gate: bool,
        D_per_channel: bool,
        use_bias: bool,
        use_conv_bias: bool,
        layer_idx: int,
    ) -> None:
        super().__init__(layer_idx)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.state_size = state_size
        self.n_groups = n_groups
        self.conv_kernel = conv_kernel
        self.chunk_size = chunk_size
        self.time_step = (time_step_min, time_step_max, time_step_floor)
        self.time_step_limit = time_step_limit
        self.ssm_size = num_heads * head_dim
        self.mlp_size = inner_size - self.ssm_size
        if self.mlp_size < 0:
            raise ValueError(
                f"num_heads * head_dim = {self.ssm_size} must not exceed inner_size {inner_size}"
            )
        self.conv_size = self.ssm_size + 2 * n_groups * state_size
        self.conv1d = CausalConv1d(self.conv_size, conv_kernel, bias=use_conv_bias)
        in_size = 2 * self.mlp_size + self.ssm_size + self.conv_size + num_heads
        self.in_proj = Linear(hidden_size, in_size, bias=use_bias)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.norm = None
        if norm_eps is not None:
            self.norm = RMSNorm(
                self.ssm_size,
                eps=norm_eps,
                group_size=self.ssm_size // n_groups,
                norm_before_gate=norm_before_gate,
            )
        self.D = nn.Parameter(torch.empty(self.ssm_size if D_per_channel else num_heads))
        self.out_proj = Linear(inner_size, hidden_size, bias=use_bias)
        # A mixer used outside a model is initialised too; a model draws again, by its config.
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values (Dao and Gu 2024; A = 1..H in transformers' scheme)."""
        reset_linear(self.in_proj, scheme, std)
        reset_conv(self.conv1d, scheme)
        reset_out_proj(self.out_proj, num_residual_layers)
        device = self.A_log.device
        init.copy_(self.dt_bias, dt_bias_values(self.num_heads, *self.time_step, device))
        if scheme == "transformers":
            rates = torch.arange(1, self.num_heads + 1, dtype=torch.float32, device=device).log()
        else:
            rates = log_uniform_values(1, 16, self.num_heads, device)
        init.copy_(self.A_log, rates)
        init.ones_(self.D)
        if self.norm is not None:
            self.norm.reset_parameters()

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The last K-1 inputs of the convolution, and S."""
        return {
            "conv_state": (batch, self.conv_kernel - 1, self.conv_size),
            "ssm_state": (batch, self.num_heads, self.head_dim, self.state_size),
        }

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, convolution, and the scan in its chunked form.

        The scan's matrix products: C B^T per group and scores times x per head inside a chunk of Q
        tokens, states and outputs per head between chunks.
        """
        linear = self.in_proj.in_features * self.in_proj.out_features
        linear += self.out_proj.in_features * self.out_proj.out_features
        groups, states, width, q = self.n_groups, self.state_size, self.ssm_size, self.chunk_size
        scan = q * (groups * states + width) + 2 * width * states
        return 2 * (linear + self.conv_kernel * self.conv_size + scan)

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        """Mix x (B, T, D); with a cache, continue from its state and update it."""
        proj = self.in_proj(x)
        gate_mlp, mlp, z, conv_in, dt = proj.split(
            [self.mlp_size, self.mlp_size, self.ssm_size, self.conv_size, self.num_heads], dim=-1
        )
        layer, state = self._layer(past_key_values, conv_in)
        if layer is not None and is_plain_step(x, seq, layer) and all_plain(self.conv1d, self.norm):
            return self.out_proj(self._step(proj[:, 0], layer, **self._norm_options())[:, None])
        if layer is None and self._can_mix():
            return self._mix(proj, seq)
        keep = layer is not None
        conv_out, conv_state = self.conv1d(conv_in, seq, state.get("conv_state"), keep)
        grouped = self.n_groups * self.state_size
        hidden, B, C = conv_out.split([self.ssm_size, grouped, grouped], dim=-1)
        hidden = hidden.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (v.unflatten(-1, (self.n_groups, self.state_size)) for v in (B, C))
        A = -torch.exp(self.A_log.to(compute_dtype(self.A_log)))
        scanned = ssd(
            hidden,
            dt,
            A,
            B,
            C,
            chunk_size=self.chunk_size,
            D=self._skip(),
            z=z.unflatten(-1, (self.num_heads, self.head_dim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            initial_state=state.get("ssm_state"),
            seq_idx=seq.seq_idx,
            mask=seq.mask,
            return_final_state=keep,
        )
        y, ssm_state = with_state(scanned)
        y = y.flatten(2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.mlp_size:
            y = torch.cat([F.silu(gate_mlp) * mlp, y], dim=-1)
        if layer is not None:
            if layer.record_past:
                inputs = {"conv_in": conv_in, "x": hidden, "B": B, "mask": recorded_mask(seq, x)}
                inputs["dt"] = step_size(dt, self.dt_bias, True, self.time_step_limit, None)
                layer.record(_replay, inputs, {"A": A, **self.conv1d.replay_constants(conv_in)})
            layer.write({"conv_state": conv_state, "ssm_state": ssm_state})
        return self.out_proj(y)

    def _skip(self) -> Tensor:
        """D by heads (H,) or by channels (H, P)."""
        return self.D if self.D.shape[0] == self.num_heads else self.D.view(self.num_heads, -1)

    def residual_pass(
        self, update: Tensor, stream: Tensor | None, norm: nn.Module, seq: SequenceInfo
    ) -> tuple[Tensor, Tensor] | None:
        """Two operators: norm and in_proj, and everything after it."""
        projected = self._can_mix() and norm_and_in_proj(update, stream, norm, self.in_proj)
        return (self._mix(projected[0], seq), projected[1]) if projected else None

    def _can_mix(self) -> bool:
        """Whether what lies between the projections is what `mamba2_mix` computes."""
        return self.mlp_size == 0 and all_plain(self.conv1d, self.norm)

    def _mix(self, proj: Tensor, seq: SequenceInfo) -> Tensor:
        """Everything after in_proj, from no state to none, as one operator."""
        conv, norm, out = self.conv1d, self.norm, self.out_proj
        whole = all_plain(out) and linear_dtype(out.weight) == proj.dtype
        mixed = mamba2_mix(
            proj,
            conv.weight.squeeze(1),
            conv.bias,
            -torch.exp(self.A_log.to(compute_dtype(self.A_log))),
            self._skip(),
            self.dt_bias,
            None if norm is None else norm.weight,
            out.weight if whole else None,
            out.bias if whole else None,
            n_groups=self.n_groups,
            chunk_size=self.chunk_size,
            dt_limit=self.time_step_limit,
            norm_eps=0.0 if norm is None else norm.eps,
            norm_before_gate=norm is not None and norm.norm_before_gate,
            seq_idx=seq.seq_idx,
            mask=seq.mask,
            real_first=seq.real_first,
        )
        return mixed if whole else out(mixed)

    def _step(self, proj: Tensor, layer: RecurrentLayer, **options: Any) -> Tensor:
        """Everything between the projections for one token, proj (B, in_size) -> (B, I)."""
        return mamba2_step(
            proj,
            layer.state["conv_state"],
            layer.state["ssm_state"],
            layer.tickets(proj.shape[0], self.n_groups, proj.device),
            conv_weight=self.conv1d.weight[:, 0],
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            n_groups=self.n_groups,
            dt_limit=self.time_step_limit,
            **options,
        )

    def _norm_options(self) -> dict[str, Any]:
        """The step's norm."""
        if self.norm is None:
            return {}
        return {
            "norm_weight": self.norm.weight,
            "norm_eps": self.norm.eps,
            "norm_before_gate": self.norm.norm_before_gate,
        }

    def residual_step(
        self,
        update: Tensor,
        stream: Tensor | None,
        norm: nn.Module,
        past_key_values: RecurrentCache,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Of one or two rows three kernels: norm, in_proj and convolution; the scan; norm, out_proj
        and sum. Of some rows four: norm; in_proj and convolution; the scan; norm and out_proj."""
        some = some_rows(update, self.in_proj.weight) and self.out_proj.bias is None
        if not (
            type(norm) is ResidualNorm
            and (some or few_rows(update, self.in_proj.weight))
            and all_plain(norm, self.in_proj, self.conv1d, self.norm, self.out_proj)
            and self.mlp_size == 0
            and not (self.norm is not None and self.norm.norm_before_gate)
        ):
            return None
        batch = update.new_empty(update.shape[-3], 0, dtype=self.in_proj.weight.dtype)
        layer, state = self._layer(past_key_values, batch)
        if not is_plain_step(update if update.ndim == 3 else update[0], SequenceInfo(), layer):
            return None
        assert layer is not None
        conv = {
            "conv_state": state["conv_state"],
            "conv_weight": self.conv1d.weight[:, 0],
            "conv_bias": self.conv1d.bias,
            "conv_first": self.ssm_size,
        }
        if some:
            normed, stream = norm(update, stream)
            return self._rows_step(normed[:, 0], layer, conv), stream
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
        y = self._step(proj, layer, convolved=True, overlap=True)
        scan_norm = self.norm
        y = norm_linear(
            y,
            self.out_proj.weight,
            self.out_proj.bias,
            norm_weight=None if scan_norm is None else scan_norm.weight,
            eps=0.0 if scan_norm is None else scan_norm.eps,
            group_size=self.ssm_size // self.n_groups,
            residual=x[:, 0],
            overlap=True,
        )
        return y[:, None], None

    def _rows_step(self, normed: Tensor, layer: RecurrentLayer, conv: dict[str, Any]) -> Tensor:
        """Shares (S, B, 1, D) of the output for normed rows (B, D); the states change in place."""
        proj = rows_linear(normed, self.in_proj.weight, self.in_proj.bias, **conv, overlap=True)
        state, squares = layer.state["ssm_state"], None
        if self.norm is not None and self.n_groups == 1 and squares_of_rows is not None:
            sums = squares_of_rows(state, self.n_groups)
            squares = proj.new_empty(len(proj), sums, dtype=torch.float32) if sums else None
        y = self._step(
            proj, layer, convolved=True, overlap=True, squares=squares, **self._norm_options()
        )
        eps = 0.0 if self.norm is None else self.norm.eps
        shares = rows_linear(
            y, self.out_proj.weight, squares=squares, eps=eps, shares=True, overlap=True
        )
        return shares[:, :, None]


def _replay(state: State, inputs: dict[str, Tensor], constants: dict[str, Tensor]) -> State:
    """State after the recorded tokens; only states are of use, so C is any tensor of B's shape."""
    _, ssm_state = ssd(
        inputs["x"],
        inputs["dt"],
        constants["A"],
        inputs["B"],
        inputs["B"],
        initial_state=state.get("ssm_state"),
        mask=inputs["mask"],
        return_final_state=True,
    )
    return {"conv_state": replayed_window(state, inputs, constants), "ssm_state": ssm_state}
