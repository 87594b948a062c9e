"""What every sublayer and sequence mixer is, and the projections that the Mamba mixers share."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.cache import RecurrentCache, RecurrentLayer, State, kept_dtype
from ssm_hf.layers.linear import Linear, linear_dtype
from ssm_hf.layers.norm import ResidualNorm, RMSNorm
from ssm_hf.ops import causal_conv1d
from ssm_hf.ops.causal_conv1d import causal_conv1d_step
from ssm_hf.ops.dispatch import pick
from ssm_hf.ops.norm_proj import norm_proj
from ssm_hf.ops.packing import check_later, compute_dtype, host_may_read
from ssm_hf.sequence import SequenceInfo

Initialization = Literal["mamba_ssm", "transformers"]


class Sublayer(nn.Module):
    """What stands behind a norm on the residual stream, (B, T, D) -> (B, T, D).

    It lists the parameters that weight decay must not touch, owns its initial values, and says how
    many operations a token costs.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); with a cache, continue from its state and update it."""
        raise NotImplementedError

    def residual_step(
        self,
        update: Tensor,
        stream: Tensor | None,
        norm: nn.Module,
        past_key_values: RecurrentCache,
    ) -> tuple[Tensor, Tensor | None] | None:
        """An update and a stream whose sum is x + self(norm(x)), x = stream + update (B, 1, D), on
        top of a state, in few kernels.

        Without a stream the first is the sum; with one it may be shares (S, B, 1, D), which the
        next norm adds up. None where a fused path does not apply; `forward` then does the same.
        """
        return None

    def residual_pass(
        self, update: Tensor, stream: Tensor | None, norm: nn.Module, seq: SequenceInfo
    ) -> tuple[Tensor, Tensor] | None:
        """self(norm(x)) and x = stream + update, from no state to none, where one operator can do
        norm and the first projection, and others the rest: these keep less for the backward pass.

        None where they do not apply; `norm` and `forward` then do the same.
        """
        return None

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of one token's forward pass (a multiply-add counts 2).

        Args:
            sequence_length: of which the mean is taken, where the cost grows along the sequence.
        """
        raise NotImplementedError

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values.

        Args:
            scheme: `"mamba_ssm"` (linear layers uniform in ±1/sqrt(fan_in)) or `"transformers"`
                (normal with standard deviation `std`).
            std: used by `"transformers"` only.
            num_residual_layers: the last projection is divided by the root of it; None = not
                divided.
        """
        raise NotImplementedError


class Mixer(Sublayer):
    """Mixes along the sequence.

    Training, prefill, continuation from a cache and one-token decoding are the same call. Beside
    what a sublayer says, a mixer says how large its states are.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that this mixer keeps in a cache; -1 = grows with the sequence."""
        raise NotImplementedError

    def begin(
        self,
        layer: RecurrentLayer,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        """Put the state before a first token into the cache layer, for activations of `dtype`.

        It consists of zeros; a caller that fills them in itself gives another `make`.
        """
        layer.begin(self.state_shapes(batch), self._kept_dtypes(layer, dtype), device, make)

    def _kept_dtypes(self, layer: RecurrentLayer, dtype: torch.dtype) -> dict[str, torch.dtype]:
        wide = torch.promote_types(dtype, torch.float32)
        return {
            name: kept_dtype(name, dtype, wide, layer.state_dtype) for name in self.state_shapes(1)
        }

    def _layer(
        self, past_key_values: RecurrentCache | None, x: Tensor
    ) -> tuple[RecurrentLayer | None, State]:
        """This mixer's cache layer and its state ({} when there is none yet)."""
        if past_key_values is None:
            return None, {}
        layer = past_key_values.layers[self.layer_idx]
        shapes = self.state_shapes(x.shape[0])
        return layer, layer.read(shapes, self._kept_dtypes(layer, x.dtype))


def is_plain_step(x: Tensor, seq: SequenceInfo, layer: RecurrentLayer | None) -> bool:
    """Whether x (B, T, ...) is one real token on top of a state, with nothing to record or derive.

    Such a call, the inner loop of generation, updates the state in place.
    """
    return (
        x.shape[1] == 1
        and layer is not None
        and len(layer.state) > 0
        and not layer.record_past
        and seq.mask is None
        and not torch.is_grad_enabled()
        and not any(t.requires_grad for t in layer.state.values())
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call is the class's `forward` on plain parameters, with no hook or wrapper."""
    if (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    # A loop: `generate` asks every module, while the device has nothing to do.
    for p in module._parameters.values():
        if p is not None and type(p) is not nn.Parameter:
            return False
    return True


def all_plain(*modules: nn.Module | None) -> bool:
    """Whether the modules are of the known classes and do nothing else.

    Fused steps read the weights themselves; they step aside where a projection carries an adapter,
    a quantised weight or a hook.
    """
    return all(m is None or (type(m) in _PLAIN and has_own_forward(m)) for m in modules)


def norm_and_in_proj(
    update: Tensor, stream: Tensor | None, norm: nn.Module, in_proj: nn.Linear
) -> tuple[Tensor, Tensor] | None:
    """in_proj(norm(x)) and x = stream + update as one operator; None where one of the two is more
    than its weight."""
    if type(norm) is not ResidualNorm or not all_plain(norm, in_proj):
        return None
    dtype = linear_dtype(in_proj.weight)
    return norm_proj(
        update, stream, norm.weight, in_proj.weight, in_proj.bias, eps=norm.eps, dtype=dtype
    )


def recorded_mask(seq: SequenceInfo, x: Tensor) -> Tensor:
    """The padding mask (B, T) to record beside the inputs of x (B, T, D).

    Raises:
        ValueError: the batch is packed; recorded inputs are replayed as one document.
    """
    if seq.seq_idx is not None:
        message = "packed documents cannot be combined with a cache that records for crop()"
        if host_may_read(seq.seq_idx):
            raise ValueError(message)
        check_later((seq.seq_idx == 0).all(), message)
    if seq.mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return seq.mask


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution over (B, T, C), by default with silu.

    A subclass of `nn.Conv1d` for its parameter names, shapes and initial values. The operator runs
    in its forward, so that hooks (offloading, sharding) see the weights being used.
    """

    def __init__(
        self, channels: int, taps: int, *, bias: bool, activation: Literal["silu"] | None = "silu"
    ) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=bias)
        self.activation: Literal["silu"] | None = activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, seq: SequenceInfo, state: Tensor | None, return_state: bool = True
    ) -> tuple[Tensor, Any]:
        """x (B, T, C), the K-1 inputs before it -> act(conv(x)), the last K-1 inputs or None."""
        if x.shape[1] == 1 and state is not None and seq.mask is None:
            step = pick("causal_conv1d", "auto", x.device, reference=causal_conv1d_step,
                        triton=_convolved_token)  # fmt: skip
            y, state = step(x[:, 0], self.weight[:, 0], self.bias, self.activation, state)
            return y[:, None], state
        return with_state(
            causal_conv1d(
                x,
                self.weight[:, 0],
                self.bias,
                activation=self.activation,
                initial_state=state,
                seq_idx=seq.seq_idx,
                mask=seq.mask,
                return_final_state=return_state,
            )
        )

    def replay_constants(self, x: Tensor) -> dict[str, Tensor]:
        """What `replayed_window` needs for inputs like x: any weight of the right shape, for only
        the window matters, and the layer's own may be offloaded."""
        return {"conv_weight": x.new_zeros(x.shape[-1], self.kernel_size[0])}


def _convolved_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Literal["silu"] | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `causal_conv1d_step` gives, by the operator's kernels."""
    y, state = causal_conv1d(x[:, None], weight, bias, activation=activation, initial_state=state,
                             return_final_state=True)  # fmt: skip
    return y[:, 0], state


def with_state(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    """An operator's output and final state, None where it was not asked for."""
    return (output, None) if isinstance(output, Tensor) else output


def replayed_window(
    state: State, inputs: dict[str, Tensor], constants: dict[str, Tensor]
) -> Tensor:
    """The convolution's state after the recorded tokens."""
    _, window = causal_conv1d(
        inputs["conv_in"],
        constants["conv_weight"],
        initial_state=state.get("conv_state"),
        mask=inputs["mask"],
        return_final_state=True,
    )
    return window


class StepProjection(nn.Linear):
    """Low-rank step size -> Δ before softplus; the bias is never added in 16 bits.

    Biases lie near -5, where bf16 steps by 0.03: added in bf16 they would cost Δ 3 % accuracy.
    Being a module that is called, it can carry an adapter.
    """

    def forward(self, input: Tensor, add_bias: bool = True) -> Tensor:
        """(..., R) -> (..., I): with the bias, fp32 or wider; else the product alone, in its own
        dtype, for a scan that adds the bias itself."""
        y = F.linear(input, self.weight)
        if not add_bias:
            return y
        return y.to(compute_dtype(y)) + self.bias.to(compute_dtype(self.bias))


_PLAIN = (Linear, nn.Linear, CausalConv1d, StepProjection, RMSNorm, ResidualNorm)


def reset_linear(linear: nn.Linear, scheme: Initialization, std: float) -> None:
    """Weight by scheme, bias 0."""
    if scheme == "transformers":
        init.normal_(linear.weight, mean=0.0, std=std)
    else:
        init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    if linear.bias is not None:
        init.zeros_(linear.bias)


def reset_conv(conv: nn.Conv1d, scheme: Initialization) -> None:
    """Weight uniform in ±1/sqrt(K); the bias likewise, or 0 in transformers' scheme."""
    init.kaiming_uniform_(conv.weight, a=math.sqrt(5))
    if conv.bias is not None:
        if scheme == "transformers":
            init.zeros_(conv.bias)
        else:
            bound = 1 / math.sqrt(conv.kernel_size[0])
            init.uniform_(conv.bias, -bound, bound)


def reset_out_proj(linear: nn.Linear, num_residual_layers: int | None) -> None:
    """Uniform in ±1/sqrt(fan_in), divided by the root of the depth (Radford et al. 2019)."""
    scale = 1.0 if num_residual_layers is None else 1 / math.sqrt(num_residual_layers)
    bound = scale / math.sqrt(linear.in_features)
    init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        init.zeros_(linear.bias)
