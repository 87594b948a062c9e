"""The convolution's kernels against the torch path in fp64, which test_laws.py ties to a loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import causal_conv1d
from ssm_hf.ops.causal_conv1d import launch
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
# fp32 rounding of sums over at most a few hundred tokens.
SINGLE = 1e-6
# Small pieces, so that few tokens reach every seam between them.
PIECES = {"SEGMENTS": 4, "ROWS": 2, "STEPS": 2, "BLOCK_C": 16}


def slow(*values: Any) -> Any:
    """Parameters of the full grid: the interpreter needs seconds for each."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = launch.tuned

    def small(kernel: str, size: str, device: torch.device) -> dict[str, int]:
        options = tuned(kernel, size, device)
        if kernel == "real_first":
            return {**options, "BLOCK": 16}
        return {**options, **{k: v for k, v in PIECES.items() if k in options}}

    monkeypatch.setattr(launch, "tuned", small)


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def _leaves(
    batch: int, length: int, channels: int, taps: int, states: int | None = None
) -> dict[str, Tensor | None]:
    return {
        "x": _leaf(batch, length, channels),
        "weight": _leaf(channels, taps),
        "bias": _leaf(channels),
        "initial_state": _leaf(states or batch, taps - 1, channels),
    }


def _assert_same(
    leaves: dict[str, Tensor | None],
    tolerance: float = SINGLE,
    *,
    use_state: bool = True,
    activation: str | None = "silu",
    **packing: Any,
) -> None:
    """y, final state and all gradients by the kernels, and by the torch path in fp64."""
    wide = {
        name: None if leaf is None else leaf.detach().double().requires_grad_()
        for name, leaf in leaves.items()
    }
    results = []
    for group, impl in ((leaves, "triton"), (wide, "reference")):
        y, final = causal_conv1d(
            **group, activation=activation, return_final_state=True, impl=impl, **packing
        )
        generator = torch.Generator().manual_seed(1)
        loss = 0.0
        for out in (y, final) if use_state else (y,):
            probe = torch.randn(out.shape, generator=generator).to(out.device)
            loss = loss + (out.double() * probe).sum()
        given = {name: leaf for name, leaf in group.items() if leaf is not None}
        grads = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
        results.append({"y": y, "final": final, **dict(zip(given, grads, strict=True))})
    got, expected = results
    for name, right in expected.items():
        assert got[name].shape == right.shape, name
        assert relative_error(got[name], right) < tolerance, name
    for name, leaf in leaves.items():
        if leaf is not None:
            assert got[name].dtype == leaf.dtype, name


@pytest.mark.parametrize(
    ("taps", "length"),
    [(1, 9), (2, 1), (4, 2), (4, 21), slow(3, 21), slow(4, 1), slow(8, 4), slow(8, 18)],
)
def test_conv_kernel_equals_torch(taps: int, length: int) -> None:
    _assert_same(_leaves(2, length, 5, taps))


def test_conv_kernel_with_several_blocks_of_channels() -> None:
    _assert_same(_leaves(1, 3, 20, 3))


@pytest.mark.parametrize("without", ["bias", "initial_state", "activation", "use_state"])
def test_conv_kernel_without_an_option(without: str) -> None:
    leaves = _leaves(1, 9, 5, 4)
    options: dict[str, Any] = {"activation": "silu"}
    if without == "activation":
        options["activation"] = None
    elif without == "use_state":
        options["use_state"] = False
    else:
        leaves[without] = None
    _assert_same(leaves, **options)


def _mask(kind: str, batch: int, length: int) -> Tensor:
    """No pads, one, half of the row, and pads alone."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        pads = (0, 1, length // 2, length)[row % 4]
        if kind == "left":
            mask[row, :pads] = False
        elif kind == "right":
            mask[row, length - pads :] = False
        else:
            mask[row, torch.randperm(length)[:pads]] = False
    return mask.to(DEVICE)


def _numbers(batch: int, length: int, often: float) -> Tensor:
    return ((torch.rand(batch, length) < often).cumsum(1) * 3 + 7).to(DEVICE)


@pytest.mark.parametrize(
    ("kind", "length"),
    [("left", 14), ("middle", 14), slow("right", 20), slow("middle", 2)],
)
def test_conv_kernel_skips_pads(kind: str, length: int) -> None:
    _assert_same(_leaves(4, length, 5, 4), mask=_mask(kind, 4, length))


@pytest.mark.parametrize(
    ("often", "state"), [(0.2, True), slow(0.05, True), slow(0.5, True), slow(0.5, False)]
)
def test_conv_kernel_keeps_packed_documents_apart(often: float, state: bool) -> None:
    leaves = _leaves(2, 14, 5, 4)
    if not state:
        leaves["initial_state"] = None
    _assert_same(leaves, seq_idx=_numbers(2, 14, often))
    _assert_same(leaves, seq_idx=_numbers(2, 14, often).int(), mask=_mask("middle", 3, 14)[1:])


@pytest.mark.slow
def test_conv_kernel_breaks_between_any_tokens() -> None:
    # Every pattern of breaks among the first tokens, and so among the last.
    patterns = torch.cartesian_prod(*[torch.tensor([0, 1])] * 3)
    seq_idx = torch.nn.functional.pad(patterns, (1, 0)).cumsum(1).to(DEVICE)
    _assert_same(_leaves(8, 4, 3, 4), seq_idx=seq_idx)


@pytest.mark.parametrize(
    ("state", "padded"), [(True, True), slow(True, False), slow(False, True), slow(False, False)]
)
def test_conv_kernel_has_a_state_per_document(state: bool, padded: bool) -> None:
    # Empty documents at the ends and inside, and some shorter than the window.
    offsets = [0, 0, 3, 3, 4, 5, 16, 18, 24, 24]
    leaves = _leaves(1, 24, 5, 4, states=len(offsets) - 1)
    if not state:
        leaves["initial_state"] = None
    mask = None
    if padded:
        mask = torch.rand(1, 24) < 0.7
        mask[:, 3] = False  # a document of pads alone
        mask = mask.to(DEVICE)
    cu_seqlens = torch.tensor(offsets, device=DEVICE)
    _assert_same(leaves, cu_seqlens=cu_seqlens, mask=mask)
    _assert_same(leaves, cu_seqlens=cu_seqlens.int(), mask=mask, use_state=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
def test_conv_kernel_takes_each_tensor_in_its_dtype(dtype: torch.dtype) -> None:
    leaves = _leaves(1, 9, 5, 4)
    leaves["x"] = _leaf(1, 9, 5, dtype=dtype)
    leaves["initial_state"] = _leaf(1, 3, 5, dtype=dtype)
    # Outputs are rounded to 8 or 11 bits; the interpreter cuts off, which costs one bit more.
    _assert_same(leaves, 2**-7 if dtype == torch.bfloat16 else 2**-10)
    y, final = causal_conv1d(**leaves, return_final_state=True, impl="triton")
    assert (y.dtype, final.dtype) == (dtype, dtype)
    assert torch.equal(final, leaves["x"][:, -3:])


def test_conv_kernel_takes_views_as_they_are() -> None:
    wide = torch.randn(2, 5, 40, device=DEVICE)
    weight = torch.randn(16, 4, device=DEVICE)
    for x in (wide[..., 3:19], wide[..., 8:24], wide[:1, :, :16].expand(2, -1, -1)):
        leaf = x.detach().requires_grad_()
        y = causal_conv1d(leaf, weight, impl="triton")
        expected = causal_conv1d(x.contiguous(), weight, impl="triton")
        assert torch.equal(y, expected)
        probe = wide[..., 20:36]  # a strided gradient
        (got,) = torch.autograd.grad(y, leaf, probe)
        copy = x.contiguous().requires_grad_()
        (right,) = torch.autograd.grad(
            causal_conv1d(copy, weight, impl="triton"), copy, probe.contiguous()
        )
        assert torch.equal(got, right)
    strided = torch.randn(1, 16, 5, device=DEVICE).transpose(1, 2)
    assert torch.equal(
        causal_conv1d(strided, weight, impl="triton"),
        causal_conv1d(strided.contiguous(), weight, impl="triton"),
    )


def test_conv_kernel_with_frozen_weights() -> None:
    x, weight, bias = _leaf(2, 9, 5), _leaf(5, 4), _leaf(5)
    probe = torch.randn(2, 9, 5, device=DEVICE)
    (expected,) = torch.autograd.grad(causal_conv1d(x, weight, bias, impl="triton"), x, probe)
    y = causal_conv1d(x, weight.detach(), bias.detach(), impl="triton")
    assert torch.equal(torch.autograd.grad(y, x, probe)[0], expected)


def test_conv_kernel_repeats_itself() -> None:
    leaves = _leaves(1, 40, 5, 4)
    runs = [
        torch.autograd.grad(
            causal_conv1d(**leaves, impl="triton").square().sum(), list(leaves.values())
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_conv_kernels_are_traceable() -> None:
    leaves = _leaves(2, 9, 5, 4)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    packing = (_numbers(2, 9, 0.2), None, *launch.real_first_triton(_mask("left", 2, 9)))
    for arguments in (
        (*leaves.values(), *packing, True, True),
        (leaves["x"], leaves["weight"], *(None,) * 6, False, False),
    ):
        torch.library.opcheck(launch._forward, arguments, test_utils=tests)


def test_conv_kernel_compiles_without_breaks() -> None:
    leaves = _leaves(2, 9, 5, 4)
    mask, numbers = _mask("left", 2, 9), _numbers(2, 9, 0.2)

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        y, final = causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=state,
            seq_idx=numbers,
            mask=mask,
            return_final_state=True,
            impl="triton",
        )
        return y.square().sum() + final.sum()

    inputs = list(leaves.values())
    expected = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for grad, right in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert relative_error(grad, right) < SINGLE


def test_conv_kernel_refuses_many_taps_and_doubles() -> None:
    x = torch.ones(1, 3, 4, device=DEVICE)
    weight = torch.ones(4, 9, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"1 to 8 taps, got K=9; use impl=\"auto\" or \"ref"):
        causal_conv1d(x, weight, impl="triton")
    assert causal_conv1d(x, weight).shape == x.shape
    with pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, got torch.float64"):
        causal_conv1d(x.double(), weight[:, :4], impl="triton")
    with pytest.raises(ValueError, match=r"causal_conv1d: weight lies on meta"):
        causal_conv1d(x, weight[:, :4].to("meta"), impl="triton")
