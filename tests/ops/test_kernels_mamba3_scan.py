"""Kernels of Mamba-3's scan against the torch path in fp64, which test_laws.py ties to a loop."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import mamba3_scan
from ssm_hf.ops.mamba3_scan import Mamba3State, launch, launch_grads
from ssm_hf.ops.mamba3_scan.step import mamba3_mix_step
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
# fp32 rounding, of angles too, which are sums over all tokens; gradients of scalars that act on all
# tokens are sums of terms of both signs, of which a digit or two cancel here.
SINGLE, SUMS = 1e-5, 1e-4
STATE = ("angle", "ssm", "k", "v")
slow = pytest.mark.slow


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def _leaves(
    batch: int = 1,
    length: int = 20,
    heads: int = 1,
    head_dim: int = 16,
    groups: int = 1,
    states: int = 16,
    pairs: int = 4,
    ranks: int = 1,
    *,
    rows: int | None = None,
    optional: bool = True,
    mimo: bool = False,
    contracted: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    """Inputs of `mamba3_scan` in fp32; `rows` is the number of states."""
    leaves = {
        "x": _randn(batch, length, heads, head_dim),
        "dt": _randn(batch, length, heads) - 1,
        "A": -2 * torch.rand(batch, length, heads, device=DEVICE) - 0.01,
        "B": _randn(batch, length, ranks, groups, states),
        "C": _randn(batch, length, ranks, groups, states),
    }
    if pairs:
        leaves["angles"] = _randn(batch, length, pairs)
    if optional:
        leaves |= {
            "trap": _randn(batch, length, heads),
            "D": _randn(heads),
            "B_bias": _randn(heads, ranks, states),
            "C_bias": _randn(heads, ranks, states),
            "dt_bias": _randn(heads),
        }
        if contracted:
            leaves["z"] = _randn(batch, length, heads, head_dim)
    if mimo:
        names = ("mimo_x", "mimo_z", "mimo_o") if contracted else ("mimo_x",)
        leaves |= {name: _randn(heads, ranks, head_dim) for name in names}
    if initial:
        rows = rows or batch
        leaves |= {
            "angle": 2 * math.pi * torch.rand(rows, heads, pairs, device=DEVICE),
            "ssm": _randn(rows, heads, head_dim, states),
            "k": _randn(rows, ranks, heads, states),
            "v": _randn(rows, heads, head_dim),
        }
    return leaves


def _outputs(leaves: dict[str, Tensor], impl: str, **options: Any) -> dict[str, Tensor]:
    """y, the four final states and all gradients."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    given: dict[str, Any] = {"trap": None, "angles": None}
    given |= {name: leaf for name, leaf in leaves.items() if name not in STATE}
    if "ssm" in leaves:
        given["initial_state"] = Mamba3State(*(leaves[name] for name in STATE))
    options = {"dt_softplus": True, **options}
    y, state = mamba3_scan(**given, **options, return_final_state=True, impl=impl)
    named = {"y": y, **{f"final {n}": v for n, v in state._asdict().items() if v.numel()}}
    generator = torch.Generator(DEVICE).manual_seed(1)
    loss = y.new_zeros((), dtype=torch.promote_types(y.dtype, torch.float32))
    for value in named.values():
        weight = torch.randn(value.shape, generator=generator, device=DEVICE)
        loss = loss + (value * weight.to(value.dtype)).sum()
    used = {name: leaf for name, leaf in leaves.items() if leaf.numel()}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    for (name, leaf), grad in zip(used.items(), grads, strict=True):
        named[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: value.detach() for name, value in named.items()}


def _error(name: str, value: Tensor, expected: Tensor) -> float:
    if name != "final angle":
        return relative_error(value, expected)
    # In radians, around the circle.
    apart = value.double() - expected.double()
    return float((torch.remainder(apart + math.pi, 2 * math.pi) - math.pi).abs().max())


def _assert_equals_reference(leaves: dict[str, Tensor], **options: Any) -> None:
    got = _outputs(leaves, "triton", **options)
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    for name, expected in _outputs(wide, "reference", **options).items():
        assert got[name].shape == expected.shape, name
        assert got[name].dtype == torch.float32, name
        sums = name in ("dD", "ddt_bias", "ddt", "dA")
        assert _error(name, got[name], expected) < (SUMS if sums else SINGLE), name


@pytest.mark.parametrize("length", [1, 66, *(pytest.param(n, marks=slow) for n in (2, 64, 130))])
def test_mamba3_scan_kernels_equal_reference(length: int) -> None:
    _assert_equals_reference(_leaves(1, length))


@pytest.mark.parametrize("layout", ["pairwise", pytest.param("half", marks=slow)])
def test_mamba3_scan_kernels_take_any_size(layout: str) -> None:
    states = 24 if layout == "half" else 23
    _assert_equals_reference(_leaves(1, 9, 2, 20, 2, states, 5), rope_layout=layout)


@pytest.mark.parametrize("pairs", [8, 0])
def test_mamba3_scan_kernels_turn_all_states_or_none(pairs: int) -> None:
    leaves = _leaves(pairs=pairs, optional=pairs == 8, initial=pairs == 8)
    _assert_equals_reference(leaves, rope_layout="half")


@pytest.mark.parametrize("ranks", [3, *(pytest.param(r, marks=slow) for r in (1, 2, 4, 8))])
def test_mamba3_scan_kernels_take_ranks(ranks: int) -> None:
    leaves = _leaves(1, 18, ranks=ranks, mimo=True)
    _assert_equals_reference(leaves, rope_layout="half")


def test_mamba3_scan_kernels_give_ranks_apart() -> None:
    _assert_equals_reference(_leaves(1, 34, ranks=2, mimo=True, contracted=False))


def _packing(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    seq_idx = (torch.rand(batch, length, device=DEVICE) < 0.1).cumsum(1) * 3 + 7
    mask = torch.rand(batch, length, device=DEVICE) < 0.7
    mask[0, :4], mask[0, -3:], mask[-1] = False, False, True
    return {
        "padded": {"mask": mask},
        "packed": {"seq_idx": seq_idx},
        "both": {"mask": mask, "seq_idx": seq_idx},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["both", *(pytest.param(k, marks=slow) for k in ("packed", "padded"))]
)
def test_mamba3_scan_kernels_pad_and_pack(kind: str) -> None:
    _assert_equals_reference(_leaves(2, 68), **_packing(kind, 2, 68))


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=slow)])
def test_mamba3_scan_kernels_keep_a_state_per_document(masked: bool) -> None:
    offsets = [0, 3, 3, 4, 70, 75]
    mask = torch.rand(1, offsets[-1], device=DEVICE) < 0.7 if masked else None
    leaves = _leaves(1, offsets[-1], rows=len(offsets) - 1)
    cu_seqlens = torch.tensor(offsets, device=DEVICE)
    _assert_equals_reference(leaves, cu_seqlens=cu_seqlens, mask=mask)


def test_mamba3_scan_kernels_do_not_depend_on_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many processors: the sequence is cut into as many segments as it has chunks for.
    monkeypatch.setattr(launch, "processors", lambda device: 1000)
    monkeypatch.setattr(launch, "SHORTEST_SEGMENT", 1)
    _assert_equals_reference(_leaves(1, 200))


def test_mamba3_scan_kernels_sum_groups_over_blocks_of_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_grads, "_heads_per_program", lambda k, most: 2)
    _assert_equals_reference(_leaves(1, 5, 8, groups=2))


# A log2 of 0, for heads and tokens that are not there.
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mamba3_scan_kernels_take_half_precision_and_repeat_exactly(dtype: torch.dtype) -> None:
    # Interpreted, products have 16-bit operands with fp16 alone.
    leaves = _leaves(1, 128, 2) if dtype == torch.float16 else _leaves(1, 20)
    for name in ("x", "dt", "trap", "B", "C", "angles", "z", "k", "v"):
        leaves[name] = leaves[name].to(dtype)
    first, second = (_outputs(leaves, "triton") for _ in range(2))
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    for name, expected in _outputs(wide, "reference").items():
        assert torch.equal(first[name], second[name]), name
        # Products have operands of 8 bits on a GPU, and so have dy and what is stored.
        assert _error(name, first[name], expected) < 2e-2, name
    assert first["y"].dtype == first["dx"].dtype == first["final k"].dtype == dtype
    assert first["final ssm"].dtype == first["final angle"].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="thousands of tokens take hours interpreted")
@pytest.mark.parametrize("length", [1024, 1000])
@pytest.mark.parametrize("ranks", [1, 4])
def test_mamba3_scan_kernels_train_at_full_size(ranks: int, length: int) -> None:
    """So many heads and whole chunks that programs walk, and need no masks."""
    leaves = _leaves(2, length, 64, 64, states=128, pairs=32, ranks=ranks, mimo=ranks > 1)
    for name in ("x", "dt", "trap", "B", "C", "angles", "z", "k", "v"):
        leaves[name] = leaves[name].bfloat16()
    got = _outputs(leaves, "triton")
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    for name, expected in _outputs(wide, "reference").items():
        # Products have operands of 8 bits, as have dy and what is stored.
        assert _error(name, got[name], expected) < 1.5e-2, name


def test_mamba3_scan_kernels_read_views_in_place() -> None:
    leaves = _leaves(1, 10, 2, initial=False)
    parts = [leaves[n].flatten(2) for n in ("z", "x", "B", "C", "dt", "trap", "angles")]
    sizes = [p.shape[-1] for p in parts]
    z, x, B, C, dt, trap, angles = torch.cat(parts, -1).split(sizes, -1)
    views = {
        **leaves,
        "z": z.unflatten(-1, (2, 16)),
        "x": x.unflatten(-1, (2, 16)),
        "B": B.unflatten(-1, (1, 1, 16)),
        "C": C.unflatten(-1, (1, 1, 16)),
        "dt": dt,
        "trap": trap,
        "angles": angles,
    }
    with torch.no_grad():
        y = mamba3_scan(**views, dt_softplus=True, impl="triton")  # pyright: ignore
        expected = mamba3_scan(**leaves, dt_softplus=True, impl="triton")  # pyright: ignore
    assert torch.equal(y, expected)  # pyright: ignore[reportArgumentType]


def test_mamba3_scan_kernels_say_what_they_do_not_take() -> None:
    leaves = _leaves(1, 4, head_dim=300, initial=False)
    with pytest.raises(RuntimeError, match=r"at most 256 channels.*P=300.*reference"):
        mamba3_scan(**leaves, impl="triton")  # pyright: ignore[reportCallIssue]
    leaves = {n: v.double() for n, v in _leaves(1, 4, initial=False).items()}
    with pytest.raises(RuntimeError, match="float64"):
        mamba3_scan(**leaves, impl="triton")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("ranks", "layout", "norm", "pairs"),
    [
        (1, "pairwise", False, 6),
        (3, "half", False, 6),
        (2, "pairwise", True, 6),
        (1, "half", True, 0),
    ],
)
def test_mamba3_step_kernel_equals_reference(
    ranks: int, layout: str, norm: bool, pairs: int
) -> None:
    batch, heads, head_dim, groups, states = 2, 4, 20, 2, 24
    trapezoid = not norm
    state = [
        2 * math.pi * torch.rand(batch, heads, pairs, device=DEVICE),
        _randn(batch, heads, head_dim, states),
        _randn(batch, ranks, heads, states),
        _randn(batch, heads, head_dim),
    ]
    weights: dict[str, Any] = {
        "B_norm_weight": _randn(states),
        "C_norm_weight": _randn(states),
        "B_bias": _randn(heads, ranks, states) if trapezoid else None,
        "C_bias": _randn(heads, ranks, states),
        "dt_bias": _randn(heads),
        "D": _randn(heads),
    }
    if ranks > 1:
        names = ("mimo_x", "mimo_z", "mimo_o")
        weights |= {name: _randn(heads, ranks, head_dim) for name in names}
    if norm:
        weights["norm_weight"] = _randn(heads * head_dim)
    options: dict[str, Any] = {
        "norm_eps": 1e-5,
        "n_groups": groups,
        "rope_layout": layout,
        "A_activation": "softplus" if norm else "heavy_tail",
        "trapezoid": trapezoid,
    }
    width = 2 * heads * head_dim + 2 * ranks * groups * states + (2 + trapezoid) * heads + pairs
    tickets = torch.zeros(batch, heads, dtype=torch.int32, device=DEVICE)
    exact = [v.double() for v in state]
    wide = {n: None if w is None else w.double() for n, w in weights.items()}
    for _ in range(3):
        proj = _randn(batch, width + 3)[:, :width]
        y = mamba3_mix_step(proj, *state, tickets, **weights, **options, impl="triton")
        expected = mamba3_mix_step(
            proj.double(), *exact, tickets, **wide, **options, impl="reference"
        )
        assert relative_error(y, expected) < SINGLE
    for value, wanted in zip(state, exact, strict=True):
        assert relative_error(value, wanted) < SINGLE
    assert not tickets.any()
