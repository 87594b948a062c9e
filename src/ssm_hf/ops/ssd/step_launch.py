"""The one-token kernel as a torch operator."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

import torch
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.causal_conv1d.step_launch import convolve_into
from ssm_hf.ops.launch import check_tensors, on_device, overlapping, power_of_two, tuned
from ssm_hf.ops.ssd.kernels_step import mamba2_step_kernel, mamba2_step_rows_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Fewer programs than this leave a GPU's multiprocessors idle. With more, a kernel of its own for
# the convolution is faster than that each head's program convolves B and C once more.
_FEW_PROGRAMS = 512


def _tiles(
    batch: int, heads: int, groups: int, head_dim: int, states: int, state: Tensor
) -> dict[str, int] | None:
    """Options of the kernel whose programs walk through tiles; None where there are too few tiles
    for that, or a head is not made of whole ones."""
    options = dict(tuned("mamba2_step_rows", "default", state.device))
    block_n = power_of_two(states)
    block_p = min(options.pop("BLOCK_STATES") // block_n, head_dim & -head_dim)
    programs = options.pop("PROGRAMS") * common.processors(state.device)
    if block_p < 16 or batch * heads * head_dim < programs * block_p:
        return None
    per_group = heads // groups * head_dim // block_p
    least = batch * groups * per_group / programs
    fitting = (t for t in range(1, per_group) if per_group % t == 0 and t >= least)
    tiles = next(fitting, per_group)
    # Where a program's first channel lies inside a head, it meets one head more.
    block_h = power_of_two(tiles * block_p // head_dim + 1)
    options["EARLY"] = min(options["EARLY"], tiles)
    return {**options, "TILES": tiles, "BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_H": block_h}


def squares_of_rows(state: Tensor, n_groups: int) -> int:
    """Programs that walk through a row's tiles, each of which leaves one sum of squares; 0 where
    the other kernel runs, for a state (B, H, P, N)."""
    batch, heads, head_dim, states = state.shape
    walked = _tiles(batch, heads, n_groups, head_dim, states, state)
    return 0 if walked is None else heads * head_dim // (walked["TILES"] * walked["BLOCK_P"])


@torch.library.custom_op(
    "ssm_hf::mamba2_step", mutates_args=("conv_state", "ssm_state", "tickets", "squares")
)
def mamba2_step_triton(
    proj: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    tickets: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_low: float,
    dt_high: float,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_before_gate: bool,
    convolved: bool,
    overlap: bool,
    squares: Tensor | None,
) -> Tensor:
    """See `ssm_hf.ops.ssd.step.mamba2_step`."""
    check_tensors(
        "mamba2_step",
        DTYPES,
        proj=proj,
        conv_state=conv_state,
        ssm_state=ssm_state,
        tickets=tickets,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        norm_weight=norm_weight,
        squares=squares,
    )
    if not (conv_state.is_contiguous() and ssm_state.is_contiguous() and tickets.is_contiguous()):
        raise ValueError("mamba2_step: the states and tickets must be contiguous")
    if proj.stride(1) != 1:
        proj = proj.contiguous()
    batch, heads, head_dim, states = ssm_state.shape
    width, (channels, taps) = heads * head_dim, conv_weight.shape
    mlp = (proj.shape[1] - width - channels - heads) // 2
    out = proj.new_empty(batch, mlp + width)
    norm = 0 if norm_weight is None else 2 if norm_before_gate else 1
    scratch = proj.new_empty(batch, width, dtype=torch.float32) if norm else None
    size = "few" if batch * heads < _FEW_PROGRAMS else "many"
    if convolved and not mlp and (not norm or squares is not None):
        walked = _tiles(batch, heads, n_groups, head_dim, states, ssm_state)
        if walked is not None:
            D_per_channel = D.shape[0] == width and head_dim > 1
            with on_device(proj):
                mamba2_step_rows_kernel[(width // (walked["TILES"] * walked["BLOCK_P"]), batch)](
                    proj, ssm_state, dt_bias, A_log, D, norm_weight, squares, out,
                    proj.stride(0), out.stride(0), heads, heads // n_groups, n_groups, channels,
                    dt_low, dt_high,
                    D_PER_CHANNEL=D_per_channel, NORM=bool(norm), HEAD_DIM=head_dim, STATES=states,
                    **walked, **overlapping(overlap, proj.device),
                )  # fmt: skip
            return out
    if squares is not None:
        raise ValueError("mamba2_step: no sums of squares of a state of this shape")
    conv, mixed = 0 if convolved else 1, None
    if conv and size == "many":
        conv, mixed = 2, proj.new_empty(batch, channels, dtype=torch.float32)
        overlap = True
    options = dict(tuned("mamba2_step", size, proj.device))
    block_n = power_of_two(states)
    # As many channels as fill the tuned number of states, but no more than a head has.
    block_p = max(1, min(options.pop("BLOCK_STATES") // block_n, power_of_two(head_dim)))
    splits = (head_dim + block_p - 1) // block_p
    per_program = (mlp + heads * splits - 1) // (heads * splits)
    with on_device(proj):
        if mixed is not None:
            first = 2 * mlp + width
            conv_in = proj[:, first : first + channels]
            convolve_into(mixed, conv_in, conv_state, conv_weight, conv_bias)
        mamba2_step_kernel[(batch * heads * splits,)](
            proj,
            conv_state,
            ssm_state,
            conv_weight.contiguous(),
            conv_bias,
            dt_bias,
            A_log,
            D,
            norm_weight,
            mixed,
            out,
            scratch,
            tickets,
            proj.stride(0),
            out.stride(0),
            heads,
            heads // n_groups,
            n_groups,
            head_dim,
            states,
            channels,
            mlp,
            splits,
            dt_low,
            dt_high,
            norm_eps,
            TAPS=taps,
            HAS_BIAS=conv_bias is not None,
            CONV=conv,
            NORM=norm,
            D_PER_CHANNEL=D.shape[0] == width and head_dim > 1,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            BLOCK_MLP=power_of_two(per_program) if mlp else 0,
            BLOCK_NORM=min(power_of_two(width // n_groups), 2048),
            **options,
            **overlapping(overlap, proj.device),
        )
    return out


@mamba2_step_triton.register_fake
def _(
    proj: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    tickets: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_low: float,
    dt_high: float,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_before_gate: bool,
    convolved: bool,
    overlap: bool,
    squares: Tensor | None,
) -> Tensor:
    width, channels = ssm_state.shape[1] * ssm_state.shape[2], conv_weight.shape[0]
    mlp = (proj.shape[1] - width - channels - ssm_state.shape[1]) // 2
    return proj.new_empty(proj.shape[0], mlp + width)
