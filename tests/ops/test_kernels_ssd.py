"""Kernels of Mamba-2's scan against the torch path in fp64, which test_laws.py ties to a loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import ssd
from ssm_hf.ops.ssd import launch
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
# fp32 rounding; the gradients of A and dt_bias are sums over all tokens of terms of both signs, of
# which up to 3 digits cancel here (torch's path in fp32 errs by as much as 9e-4).
SINGLE, SUMS = 2e-6, 1e-4
slow = pytest.mark.slow


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def _leaves(
    batch: int = 1,
    length: int = 70,
    heads: int = 2,
    head_dim: int = 16,
    groups: int = 1,
    states: int = 16,
    *,
    rows: int | None = None,
    D: int | None = 1,
    z: bool = False,
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    """Inputs of `ssd` in fp32; `D` is its number of dimensions, `rows` the number of states."""
    leaves = {
        "x": _randn(batch, length, heads, head_dim),
        "dt": _randn(batch, length, heads) - 1,
        "A": -4 * torch.rand(heads, device=DEVICE),
        "B": _randn(batch, length, groups, states),
        "C": _randn(batch, length, groups, states),
    }
    if D is not None:
        leaves["D"] = _randn(heads) if D == 1 else _randn(heads, head_dim)
    if z:
        leaves["z"] = _randn(batch, length, heads, head_dim)
    if bias:
        leaves["dt_bias"] = _randn(heads)
    if initial:
        leaves["initial_state"] = _randn(rows or batch, heads, head_dim, states)
    return leaves


def _outputs(leaves: dict[str, Tensor], impl: str, **options: Any) -> dict[str, Tensor]:
    """y, final state and all gradients."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    options = {"dt_softplus": True, **options}
    y, state = ssd(**leaves, **options, return_final_state=True, impl=impl)  # pyright: ignore
    generator = torch.Generator(DEVICE).manual_seed(1)
    loss = y.new_zeros((), dtype=torch.promote_types(y.dtype, torch.float32))
    for out in (y, state):
        weight = torch.randn(out.shape, generator=generator, device=DEVICE)
        loss = loss + (out * weight.to(out.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    gradients = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"y": y, "state": state, **gradients}


def _assert_equals_reference(leaves: dict[str, Tensor], **options: Any) -> None:
    got = _outputs(leaves, "triton", **options)
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    for name, expected in _outputs(wide, "reference", **options).items():
        assert got[name].shape == expected.shape, name
        assert got[name].dtype == (leaves[name[1:]].dtype if name[1:] in leaves else torch.float32)
        tolerance = SUMS if name in ("dA", "ddt_bias") else SINGLE
        assert relative_error(got[name], expected) < tolerance, name


@pytest.mark.parametrize(
    "length", [1, 65, *(pytest.param(n, marks=slow) for n in (2, 63, 64, 130))]
)
def test_ssd_kernels_equal_reference(length: int) -> None:
    _assert_equals_reference(_leaves(2, length, 1))


@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "states"),
    [(4, 20, 2, 24), pytest.param(3, 8, 1, 40, marks=slow), pytest.param(2, 48, 2, 5, marks=slow)],
)
def test_ssd_kernels_take_any_size(heads: int, head_dim: int, groups: int, states: int) -> None:
    _assert_equals_reference(_leaves(1, 70, heads, head_dim, groups, states))


@pytest.mark.parametrize(
    "present",
    ["none", "all", *(pytest.param(n, marks=slow) for n in ("D", "z", "bias", "initial"))],
)
def test_ssd_kernels_do_without_each_option(present: str) -> None:
    everything = present == "all"
    leaves = _leaves(
        # In the interpreter a program takes 16 states: of 24, two share out y.
        states=24 if everything else 16,
        D={"D": 1, "all": 2}.get(present),
        z=everything or present == "z",
        bias=everything or present == "bias",
        initial=everything or present == "initial",
    )
    limit = (0.2, 1.5) if everything else (0.0, float("inf"))
    _assert_equals_reference(leaves, dt_limit=limit)


def test_ssd_kernels_take_step_sizes_without_softplus() -> None:
    leaves = _leaves(bias=False)
    leaves["dt"] = leaves["dt"].abs()
    leaves["dt"][0, 5] = 0.0
    _assert_equals_reference(leaves, dt_softplus=False)


def _packing(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    seq_idx = (torch.rand(batch, length, device=DEVICE) < 0.1).cumsum(1) * 3 + 7
    mask = torch.rand(batch, length, device=DEVICE) < 0.7
    mask[0, :4], mask[-1] = False, True
    return {
        "padded": {"mask": mask},
        "packed": {"seq_idx": seq_idx},
        "both": {"mask": mask, "seq_idx": seq_idx},
    }[kind]


@pytest.mark.parametrize("kind", ["packed", "both", pytest.param("padded", marks=slow)])
def test_ssd_kernels_pad_and_pack(kind: str) -> None:
    _assert_equals_reference(_leaves(2, 70, 1, z=kind == "both"), **_packing(kind, 2, 70))


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=slow)])
def test_ssd_kernels_keep_a_state_per_document(masked: bool) -> None:
    offsets = [0, 3, 3, 4, 20, 37, 39, 170, 170]
    cu_seqlens = torch.tensor(offsets, device=DEVICE)
    mask = torch.rand(1, offsets[-1], device=DEVICE) < 0.7 if masked else None
    leaves = _leaves(1, offsets[-1], 1, rows=len(offsets) - 1)
    _assert_equals_reference(leaves, cu_seqlens=cu_seqlens, mask=mask)


@pytest.mark.parametrize("with_documents", [False, True])
def test_ssd_kernels_do_not_depend_on_segments(
    monkeypatch: pytest.MonkeyPatch, with_documents: bool
) -> None:
    # Many processors: the sequence is cut into as many segments as it has chunks for.
    monkeypatch.setattr(launch, "processors", lambda device: 1000)
    monkeypatch.setattr(launch, "SHORTEST_SEGMENT", 1)
    options, rows = {}, 1
    if with_documents:
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 290], device=DEVICE)
        rows = 3
    _assert_equals_reference(_leaves(1, 290, 1, rows=rows), **options)


def test_ssd_kernels_sum_groups_over_blocks_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_heads_per_program", lambda k, most: 2)
    _assert_equals_reference(_leaves(1, 20, 8, groups=2))


def test_ssd_kernels_keep_fp32_accuracy_behind_huge_decays() -> None:
    # Exponents of -3e4, and of a few hundred, before small ones in the same chunk.
    leaves = _leaves(1, 64, 1)
    leaves["dt"] = torch.full((1, 64, 1), 1e-2, device=DEVICE)
    leaves["dt"][0, 3], leaves["dt"][0, 20:40:3] = 3e3, 20.0
    leaves["A"] = torch.tensor([-10.0], device=DEVICE)
    leaves.pop("dt_bias")
    _assert_equals_reference(leaves, dt_softplus=False)


def test_ssd_kernels_read_views_in_place() -> None:
    leaves = _leaves(2, 40, 2, 16, 1, 16)
    wide = torch.cat([leaves["x"].flatten(2), leaves["B"].flatten(2), leaves["C"].flatten(2)], -1)
    x, B, C = wide.split([32, 16, 16], -1)
    views = {
        **leaves,
        "x": x.unflatten(-1, (2, 16)),
        "B": B.unflatten(-1, (1, 16)),
        "C": C.unflatten(-1, (1, 16)),
        "dt": torch.stack([leaves["dt"], leaves["dt"]], -1)[..., 0],
    }
    y = ssd(**views, dt_softplus=True, impl="triton")
    assert torch.equal(y, ssd(**leaves, dt_softplus=True, impl="triton"))
    # Strides that kernels do not take, and rows that are one and the same.
    strided = {
        name: torch.stack([v, v], -1)[..., 0][:1].expand(3, *v.shape[1:])
        if name in ("x", "dt", "B", "C")
        else v
        for name, v in leaves.items()
        if name != "initial_state"
    }
    y = ssd(**strided, dt_softplus=True, impl="triton")
    for row in range(3):
        assert torch.equal(y[row], y[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssd_kernels_take_half_precision(dtype: torch.dtype) -> None:
    leaves = _leaves(1, 70)
    for name in ("x", "dt", "B", "C"):
        leaves[name] = leaves[name].to(dtype)
    got = _outputs(leaves, "triton")
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    for name, expected in _outputs(wide, "reference").items():
        # Products have operands of 8 or 11 bits, and so has dy. The gradients of A and dt are sums
        # of differences of such products.
        tolerance = 4e-2 if name in ("dA", "ddt", "ddt_bias") else 1e-2
        assert relative_error(got[name], expected) < tolerance, name
    assert got["y"].dtype == got["dx"].dtype == dtype
    assert got["state"].dtype == torch.float32


def test_ssd_kernels_take_mixed_precision() -> None:
    leaves = _leaves(1, 70)
    leaves["x"] = leaves["x"].bfloat16().float()
    expected = _outputs(leaves, "triton")
    leaves["x"] = leaves["x"].bfloat16()
    got = _outputs(leaves, "triton")
    # x's values are the same; y is rounded to x's dtype, the gradient that comes back too.
    assert relative_error(got["state"], expected["state"]) < SINGLE
    for name, value in got.items():
        assert relative_error(value, expected[name]) < 2**-7, name
    assert got["y"].dtype == got["dx"].dtype == torch.bfloat16
    assert got["dB"].dtype == torch.float32


def test_ssd_kernels_repeat_exactly() -> None:
    leaves = _leaves(1, 70, 4)
    first, second = (_outputs(leaves, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_ssd_kernels_give_gradients_of_the_state_alone() -> None:
    leaves = {n: v.requires_grad_() for n, v in _leaves(1, 70).items()}
    wide = {n: v.detach().double().requires_grad_() for n, v in leaves.items()}
    grads = []
    for given, impl in ((leaves, "triton"), (wide, "reference")):
        _, state = ssd(**given, dt_softplus=True, return_final_state=True, impl=impl)
        names = ("x", "B", "dt", "initial_state")
        grads.append(torch.autograd.grad(state.square().sum(), [given[n] for n in names]))
    for value, expected in zip(*grads, strict=True):
        assert relative_error(value, expected) < 3 * SINGLE


def test_ssd_kernels_say_what_they_do_not_take() -> None:
    x = torch.randn(1, 4, 1, 300, device=DEVICE)
    dt, B = _randn(1, 4, 1), _randn(1, 4, 1, 16)
    with pytest.raises(RuntimeError, match=r"at most 256 channels.*P=300.*reference"):
        ssd(x, dt, _randn(1), B, B, impl="triton")
    with pytest.raises(RuntimeError, match="float64"):
        ssd(*(v.double() for v in (x[..., :16], dt, _randn(1), B, B)), impl="triton")
    with pytest.raises(ValueError, match="B lies on meta"):
        ssd(x[..., :16], dt, _randn(1), B.to("meta"), B, impl="triton")
