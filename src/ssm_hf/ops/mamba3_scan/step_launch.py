"""The one-token kernel as a torch operator."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.launch import (
    KERNEL_DTYPES,
    architecture,
    check_tensors,
    on_device,
    overlapping,
    power_of_two,
    tuned,
)
from ssm_hf.ops.mamba3_scan.kernels_step import mamba3_step_kernel

# Triton's annotations do not know that plain values may stand for constants.
_kernel: Any = mamba3_step_kernel
# Fewer programs than this leave a GPU's multiprocessors idle.
_FEW_PROGRAMS = 512


@torch.library.custom_op(
    "ssm_hf::mamba3_mix_step",
    mutates_args=("angle_state", "ssm_state", "k_state", "v_state", "tickets"),
)
def mamba3_mix_step_triton(
    proj: Tensor,
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    tickets: Tensor,
    B_norm_weight: Tensor,
    C_norm_weight: Tensor,
    norm_eps: float,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    norm_weight: Tensor | None,
    n_groups: int,
    pairwise: bool,
    A_floor: float,
    heavy_tail: bool,
    trapezoid: bool,
    overlap: bool,
) -> Tensor:
    """See `ssm_hf.ops.mamba3_scan.step.mamba3_mix_step`."""
    states = {"angle_state": angle_state, "ssm_state": ssm_state, "k_state": k_state,
              "v_state": v_state, "tickets": tickets}  # fmt: skip
    weights = {"B_norm_weight": B_norm_weight, "C_norm_weight": C_norm_weight, "B_bias": B_bias,
               "C_bias": C_bias, "dt_bias": dt_bias, "D": D, "mimo_x": mimo_x, "mimo_z": mimo_z,
               "mimo_o": mimo_o, "norm_weight": norm_weight}  # fmt: skip
    check_tensors("mamba3_mix_step", KERNEL_DTYPES, proj=proj, **states, **weights)
    for name, state in states.items():
        if not state.is_contiguous():
            raise ValueError(f"mamba3_mix_step: {name} must be contiguous")
    if proj.stride(1) != 1:
        proj = proj.contiguous()
    dense = [None if w is None else w.contiguous() for w in weights.values()]
    batch, heads, head_dim, n = ssm_state.shape
    pairs, ranks = angle_state.shape[-1], k_state.shape[1]
    out = proj.new_empty(batch, heads * head_dim)
    size = "few" if batch * heads < _FEW_PROGRAMS else "many"
    if ranks == 1 and norm_weight is None:
        # A warp alone waits for no other.
        size = "light"
    options = dict(tuned("mamba3_step", size, proj.device))
    block_n = power_of_two(n)
    # As many channels as fill the tuned number of states, but no more than a head has. The norm
    # takes a whole head.
    block_p = power_of_two(head_dim)
    block_states = options.pop("BLOCK_STATES")
    if norm_weight is None:
        block_p = max(1, min(block_states // block_n, block_p))
    splits = -(-head_dim // block_p)
    with on_device(proj):
        _kernel[(batch * heads * splits,)](
            proj, angle_state, ssm_state, k_state, v_state, tickets, *dense, out, proj.stride(0),
            out.stride(0), heads, n_groups, head_dim, n, pairs, splits, norm_eps, A_floor,
            RANKS=ranks, HEAVY_TAIL=heavy_tail, TRAPEZOID=trapezoid, ROPE=pairs > 0,
            PAIRWISE=pairwise, FAST=architecture(proj.device).startswith("sm"), SPLIT=splits > 1,
            BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_S=power_of_two(max(pairs, 1)), **options,
            **overlapping(overlap, proj.device),
        )  # fmt: skip
    return out


@mamba3_mix_step_triton.register_fake
def _(proj, angle_state, ssm_state, *_):  # pyright: ignore
    return proj.new_empty(proj.shape[0], ssm_state.shape[1] * ssm_state.shape[2])
