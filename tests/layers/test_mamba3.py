"""What Mamba-3's mixer has beyond the laws: its two layouts, and its streams."""

import pytest
import torch
from torch import Tensor

import ssm_hf
from ssm_hf import Mamba3ForCausalLM, RecurrentCache
from ssm_hf.ops.mamba3_scan import rope_permutation
from ssm_hf.sequence import SequenceInfo
from tests.helpers import kernel_device, randomize_, relative_error, tiny
from tests.layers.test_laws import D, _mamba3

ALL = SequenceInfo()


def _x() -> Tensor:
    return torch.randn(2, 9, D, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("angles", [1, 3])
def test_one_layout_computes_what_the_other_does_with_permuted_states(
    angles: int, rank: int
) -> None:
    sizes = {"num_angles": angles, "mimo_rank": rank}
    pairwise = randomize_(_mamba3(rope_layout="pairwise", **sizes)).double()
    half = _mamba3(rope_layout="half", **sizes).double()
    order = rope_permutation(6, angles)
    weights = pairwise.state_dict()
    for name in ("B_norm.weight", "C_norm.weight", "B_bias", "C_bias"):
        weights[name] = weights[name][..., order]
    parts = list(weights["in_proj.weight"].split(pairwise.sizes))  # pyright: ignore
    for i in (2, 3):  # B and C
        parts[i] = parts[i].unflatten(0, (-1, 6))[:, order].flatten(0, 1)
    weights["in_proj.weight"] = torch.cat(parts)
    half.load_state_dict(weights)
    x = _x()
    assert relative_error(half(x, ALL), pairwise(x, ALL)) < 1e-12  # fp64 rounding


@torch.no_grad()
def test_streams_that_share_everything_are_one() -> None:
    """B and C alike in both streams, x halved twice and the outputs added: SISO with twice B."""
    one = randomize_(_mamba3(rope_layout="half")).double()
    two = _mamba3(rope_layout="half", mimo_rank=2).double()
    weights = one.state_dict()
    for name in ("B_bias", "C_bias"):
        weights[name] = weights[name].repeat(1, 2, 1)
    parts = list(weights["in_proj.weight"].split(one.sizes))  # pyright: ignore
    parts[2:4] = [part.repeat(2, 1) for part in parts[2:4]]
    weights["in_proj.weight"] = torch.cat(parts)
    for name, value in (("mimo_x", 0.5), ("mimo_z", 1.0), ("mimo_o", 1.0)):
        weights[name] = torch.full((4, 2, 4), value, dtype=torch.float64)
    # The state then holds x k once, each stream reads all of it, and D x comes halved twice.
    weights["D"] = weights["D"] * 2
    two.load_state_dict(weights)
    x = _x()
    assert relative_error(two(x, ALL), 2 * one(x, ALL)) < 1e-12


def test_a_state_of_another_rank_is_refused() -> None:
    cache = RecurrentCache(tiny("mamba3", num_hidden_layers=1))
    _mamba3(mimo_rank=2, rope_layout="half").double()(_x(), ALL, cache)
    message = r"belongs to another model: k_state has shape \(2, 2, 4, 6\), expected \(2, 1, 4, 6\)"
    with pytest.raises(ValueError, match=message):
        _mamba3().double()(_x(), ALL, cache)


def test_sizes_that_contradict_one_another_are_refused() -> None:
    for changes, message in (
        ({"mimo_rank": 0}, "mimo_rank must be at least 1, got 0"),
        ({"n_groups": 3}, "n_groups=3 does not divide num_heads=4"),
        ({"A_activation": "relu"}, "A_activation must be 'heavy_tail' or 'softplus', got 'relu'"),
        ({"rope_layout": "no"}, "rope_layout must be 'pairwise' or 'half', got 'no'"),
        ({"num_angles": 4}, "num_angles=4 pairs do not fit into state_size=6"),
        ({"rope_layout": "half", "state_size": 5}, "an even state_size, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            _mamba3(**changes)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rows"), [("mamba3", 1), ("mamba3-mimo", 3)])
def test_a_step_by_kernels_equals_the_torch_path(kind: str, rows: int) -> None:
    """With few rows three kernels for the mixer and two for the MLP, with more one for the scan."""
    device = kernel_device()
    config = tiny(kind, num_hidden_layers=1, head_dim=32, n_groups=1)
    model = randomize_(Mamba3ForCausalLM(config)).to(device).eval()  # pyright: ignore
    ids = torch.randint(3, 96, (rows, 6), device=device)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with ssm_hf.implementation("reference"):
        expected = model(ids).logits[:, 5:]
    with ssm_hf.implementation("triton"):
        logits = model(ids[:, 5:], past_key_values=cache).logits
    # fp32 rounding
    assert relative_error(logits, expected) < 1e-5
