"""Mamba-3's mixer against the authors' module, where that is installed."""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_hf.layers.mamba3 import Mamba3Mixer
from ssm_hf.ops.mamba3_scan import mamba3_scan_recurrent
from ssm_hf.sequence import SequenceInfo
from tests.helpers import randomize_, relative_error

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mamba_ssm", "einops", "triton")),
    reason="needs mamba_ssm 2.3.2.post1 (its kernels may be missing: install it with "
    "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE and --no-deps), einops and triton",
)


class PlainNorm(nn.Module):
    """What the package's RMSNormGated computes, without its kernel."""

    def __init__(self, size: int, eps: float, group_size: int | None = None, **options: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.group = eps, group_size or size

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        normed = (groups * scale).flatten(-2) * self.weight
        return normed if z is None else normed * nn.functional.silu(z)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.double() for v in tensors]


def _scan(rope_layout: str, given: dict[str, Any]) -> Tensor:
    """The kernels' arguments as our definition takes them; their time steps come multiplied."""
    dt, ADT, trap = (given[name].transpose(1, 2) for name in ("DT", "ADT", "Trap"))
    wide = _wide(given["V"], dt, ADT / dt, trap, given["K"], given["Q"], given["Angles"][:, :, 0])
    names = {"B_bias": "K_bias", "C_bias": "Q_bias", "mimo_x": "MIMO_V", "mimo_z": "MIMO_Z",
             "mimo_o": "MIMO_Out", "D": "D", "z": "Z"}  # fmt: skip
    weights = dict(zip(names, _wide(*(given.get(n) for n in names.values())), strict=True))
    if weights["z"] is None:
        weights["mimo_z"] = None
    y, _ = mamba3_scan_recurrent(*wide, **weights, rope_layout=rope_layout)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return y.to(given["V"].dtype)


def siso(**given: Any) -> Tensor:
    for name in ("Q", "K"):
        given[name] = given[name].unsqueeze(2)
        given[f"{name}_bias"] = given[f"{name}_bias"].unsqueeze(1)
    return _scan("pairwise", given)


def mimo(**given: Any) -> Tensor:
    return _scan("half", given)


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """The package's Mamba3, with kernels replaced."""
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("mamba_ssm.modules.mamba3")
    monkeypatch.setattr(module, "mamba3_siso_combined", siso)
    monkeypatch.setattr(module, "mamba3_mimo_combined", mimo)
    monkeypatch.setattr(module, "RMSNormGated", PlainNorm)
    return module.Mamba3


@pytest.mark.parametrize(
    ("ranks", "fraction", "groups", "norm", "dtype"),
    [
        (1, 0.5, 1, False, torch.float64),
        (1, 1.0, 2, False, torch.float64),
        (1, 0.5, 2, True, torch.float64),
        (2, 0.5, 1, False, torch.float64),
        (4, 1.0, 2, False, torch.float64),
        # the package's norm of several ranks mixes fp32 into its inputs and takes nothing wider
        (2, 0.5, 2, True, torch.float32),
    ],
)
def test_mixer_equals_the_official_module(
    official: Callable[..., nn.Module],
    ranks: int,
    fraction: float,
    groups: int,
    norm: bool,
    dtype: torch.dtype,
) -> None:
    hidden, heads, head_dim, states = 16, 4, 8, 16
    theirs = official(
        hidden,
        d_state=states,
        headdim=head_dim,
        ngroups=groups,
        rope_fraction=fraction,
        is_outproj_norm=norm,
        is_mimo=ranks > 1,
        mimo_rank=ranks,
    ).to(dtype)
    randomize_(theirs)
    ours = Mamba3Mixer(
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        state_size=states,
        n_groups=groups,
        mimo_rank=ranks,
        num_angles=int(states * fraction) // 2,
        rope_layout="half" if ranks > 1 else "pairwise",
        A_activation="softplus",
        A_floor=1e-4,
        trapezoid=True,
        bc_bias=True,
        chunk_size=16,
        time_step_min=0.001,
        time_step_max=0.1,
        time_step_floor=1e-4,
        norm_eps=1e-5,
        output_norm=norm,
        use_bias=False,
        layer_idx=0,
    ).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    u = torch.randn(2, 40, hidden, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 40, hidden, dtype=dtype)
    results = []
    for mixer, y in ((ours, ours(u, SequenceInfo())), (theirs, theirs(u))):
        weights = dict(sorted(mixer.named_parameters()))
        results.append([y, *torch.autograd.grad(y, [u, *weights.values()], dy)])
    for value, expected in zip(*results, strict=True):
        # the package rounds rates and angles to fp32 also where everything else is fp64
        assert relative_error(value, expected) < 1e-5
