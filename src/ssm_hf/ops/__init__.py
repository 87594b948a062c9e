"""Operators: a folder each, with one public function, its reference and its kernels."""

from contextlib import nullcontext

from ssm_hf.ops.causal_conv1d import causal_conv1d
from ssm_hf.ops.cross_entropy import linear_cross_entropy
from ssm_hf.ops.dispatch import (
    HAS_TRITON,
    ImplementationUnavailableError,
    implementation,
    implementations,
    keep_activations,
    print_implementations,
)
from ssm_hf.ops.linear_scan import linear_scan
from ssm_hf.ops.mamba3_scan import Mamba3State, mamba3_scan
from ssm_hf.ops.moe import moe_experts, moe_route
from ssm_hf.ops.narrow import NarrowWeights
from ssm_hf.ops.rms_norm import add_rms_norm, rms_norm
from ssm_hf.ops.selective_scan import selective_scan
from ssm_hf.ops.ssd import ssd

if HAS_TRITON:
    from ssm_hf.ops.kernels_ahead import compile_ahead
else:
    compile_ahead = nullcontext

__all__ = [
    "ImplementationUnavailableError",
    "Mamba3State",
    "NarrowWeights",
    "add_rms_norm",
    "causal_conv1d",
    "compile_ahead",
    "implementation",
    "implementations",
    "keep_activations",
    "linear_cross_entropy",
    "linear_scan",
    "mamba3_scan",
    "moe_experts",
    "moe_route",
    "print_implementations",
    "rms_norm",
    "selective_scan",
    "ssd",
]
