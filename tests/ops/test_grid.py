"""The full grid of tests/ops/grid.py, and what its expected values rest on."""

import functools
import json

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import causal_conv1d, rms_norm, ssd
from tests.helpers import relative_error
from tests.ops import grid
from tests.ops.pairwise import LISTS, covering_list, possible

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SCANS = ("ssd", "selective_scan")
MIXERS = ("mamba1_mix", "mamba2_mix")
on_gpu = [pytest.mark.gpu, pytest.mark.slow, needs_gpu]


@pytest.mark.parametrize(
    ("name", "rows"), list(zip(LISTS, (grid.ROWS, grid.TRAINING_ROWS), strict=True))
)
def test_list_is_the_generated_one_and_covers_every_pair(name: str, rows: list[grid.Row]) -> None:
    factors = LISTS[name]
    assert covering_list(factors) == rows
    seen = {(a, str(row[a]), b, str(row[b])) for row in rows for a in factors for b in factors}
    for a in factors:
        for b in factors:
            for x in factors[a]:
                for y in factors[b]:
                    if a != b and possible({a: x, b: y}):
                        assert (a, str(x), b, str(y)) in seen


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("operator", [*SCANS, *MIXERS])
def test_chunked_path_equals_the_sequential_definition(operator: str, packing: str) -> None:
    """What is expected of rows too long for the definition: the torch path in fp64."""
    row = {
        "T": 131, "N": 16, "B": 1, "G": 2, "P": 32, "packing": packing, "dtype": "float32",
        "mask": True, "initial_state": True, "extras": True, "norm": packing == "none", "out": True,
    }  # fmt: skip
    if operator in MIXERS and packing == "cu_seqlens":
        row |= {"packing": "seq_idx", "mask": False, "out": False}
    inputs = grid.draw(operator, row, torch.device("cpu"))
    op = grid.OPERATORS[operator]
    chunked = functools.partial(grid.call, op.run, impl="reference")
    got, cotangents = grid.evaluate(chunked, inputs, dtype=torch.float64)
    expected = grid.expect(operator, row, inputs, cotangents)
    assert set(got) == set(expected)
    for name, value in got.items():
        # Both in fp64: 131 steps of rounding at 1e-16.
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize(
    ("operator", "row"),
    [
        pytest.param(o, r, id=f"{o}-{grid.name_of(r)}")
        for o in grid.OPERATORS
        for r in grid.rows_of(o)
    ],
)
@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
def test_kernels_on_the_grid(operator: str, row: grid.Row) -> None:
    values = grid.check(operator, row, torch.device("cuda"))
    bad = {name: v for name, v in values.items() if not v["error"] <= v["bound"]}
    assert not bad, json.dumps(bad)


def _slices_of_a_projection(device: torch.device, rows: int, length: int, width: int) -> Tensor:
    """A wide projection's output of which only the last channels are ever touched."""
    wide = torch.empty(rows, length, width, dtype=torch.bfloat16, device=device)
    wide[..., -2048:].normal_()
    return wide


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
def test_kernels_take_views_beyond_two_to_the_31_elements() -> None:
    """Offsets of rows and of tokens both pass 2^31: the last row must be as if it stood alone."""
    device = torch.device("cuda")
    wide = _slices_of_a_projection(device, 2, 70000, 16640)
    assert wide.numel() > 2**31
    heads, P, N = 4, 64, 128

    def parts(source: Tensor) -> dict[str, Tensor]:
        cut = {"x": (256, 512), "B": (512, 640), "C": (640, 768), "dt": (768, 772)}
        views = {n: source[..., -1024:][..., a:b] for n, (a, b) in cut.items()}
        return {
            "x": views["x"].unflatten(-1, (heads, P)),
            "dt": views["dt"],
            "B": views["B"].unflatten(-1, (1, N)),
            "C": views["C"].unflatten(-1, (1, N)),
        }

    def run_ssd(source: Tensor) -> list[Tensor]:
        leaves = {n: v.detach().requires_grad_() for n, v in parts(source).items()}
        assert leaves["x"].stride() == parts(source)["x"].stride()
        A = -torch.arange(1.0, heads + 1, device=device)
        y = ssd(**leaves, A=A, dt_softplus=True, impl="triton")
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    def run_conv(source: Tensor) -> list[Tensor]:
        x = source[..., -1024:-256].detach().requires_grad_()
        weight = torch.ones(768, 4, device=device, dtype=torch.bfloat16)
        y = causal_conv1d(x, weight, activation="silu", impl="triton")
        return [y, *torch.autograd.grad(y, [x], torch.ones_like(y))]

    def run_norm(source: Tensor) -> list[Tensor]:
        x, gate = source[..., -1024:-512].detach(), source[..., -512:].detach()
        x, gate = x.requires_grad_(), gate.requires_grad_()
        y = rms_norm(x, torch.ones(512, device=device), eps=1e-5, gate=gate, impl="triton")
        return [y, *torch.autograd.grad(y, [x, gate], torch.ones_like(y))]

    for run in (run_ssd, run_conv, run_norm):
        last = [value[-1:].clone() for value in run(wide)]
        alone = run(wide[-1:, :, -2048:].contiguous())
        for got, expected in zip(last, alone, strict=True):
            # Sums over tokens may be cut into other segments when there are fewer rows.
            assert relative_error(got, expected) < 3e-3, run.__name__
            assert bool(torch.isfinite(got).all())


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
def test_norm_takes_contiguous_tensors_beyond_two_to_the_31_elements() -> None:
    x = torch.empty(270_000, 8192, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-64:].normal_()
    weight = torch.ones(8192, device="cuda")
    got = rms_norm(x, weight, eps=1e-5, impl="triton")[-64:]
    assert torch.equal(got, rms_norm(x[-64:].clone(), weight, eps=1e-5, impl="triton"))


@pytest.mark.parametrize("operator", SCANS)
@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
def test_views_of_a_projection_equal_their_copies(operator: str) -> None:
    device, row = torch.device("cuda"), {**grid.ROWS[-1], "T": 200, "packing": "none"}
    inputs = grid.draw(operator, row, device)
    op = grid.OPERATORS[operator]
    kernel = functools.partial(grid.call, op.run, impl="triton")
    expected, cotangents = grid.evaluate(kernel, inputs)

    def embedded(value: Tensor) -> Tensor:
        flat = value.flatten(2)
        wide = value.new_zeros(*flat.shape[:2], flat.shape[2] + 40)
        wide[..., 24 : 24 + flat.shape[2]] = flat
        return wide[..., 24 : 24 + flat.shape[2]].unflatten(2, value.shape[2:])

    views = {n: embedded(v) if n in ("x", "dt", "B", "C", "z") else v for n, v in inputs.items()}
    got, _ = grid.evaluate(kernel, views, cotangents)
    for name, value in got.items():
        # Other strides load in other widths, so that sums may be formed in another order: the last
        # digits of fp32, or one rounding to bf16.
        close = 1e-5 if value.dtype == torch.float32 else 3e-3
        assert relative_error(value, expected[name]) < close, name
