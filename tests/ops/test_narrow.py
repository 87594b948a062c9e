"""Weights that are rounded once a pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_hf.ops import NarrowWeights, keep_activations, linear_cross_entropy
from ssm_hf.ops.mamba1_mix import mamba1_mix
from ssm_hf.ops.mamba2_mix import mamba2_mix
from ssm_hf.ops.narrow import is_kept, narrow
from ssm_hf.ops.norm_proj import norm_proj
from tests.helpers import kernel_device

DEVICE = kernel_device()


def test_copies_are_those_of_the_last_renewal() -> None:
    weights, weight = NarrowWeights(), nn.Parameter(torch.randn(3, 5))
    with weights.in_pass():
        assert not is_kept(weight, torch.bfloat16)  # memory is not to be spent
    assert not is_kept(weight, torch.bfloat16)
    with keep_activations(), weights.in_pass():
        copy = narrow(weight, torch.bfloat16)
        assert is_kept(weight, torch.bfloat16)
        assert torch.equal(copy, weight.bfloat16())
        assert narrow(weight, torch.bfloat16) is copy
        assert narrow(weight, torch.float16).dtype == torch.float16
        assert narrow(weight, torch.float32) is weight
    before = copy.clone()
    with torch.no_grad():
        weight.add_(1)
    with weights.in_pass(renew=False):
        assert torch.equal(narrow(weight, torch.bfloat16), before)
    with weights.in_pass():
        assert narrow(weight, torch.bfloat16) is copy
        assert torch.equal(copy, weight.bfloat16())
    assert torch.equal(narrow(weight, torch.bfloat16), weight.bfloat16())
    assert narrow(weight, torch.bfloat16) is not copy


def test_what_is_no_parameter_is_rounded_each_time() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    with keep_activations(), NarrowWeights().in_pass():
        for other in (weight[:2], weight.detach(), torch.randn(4, 4)):
            assert not is_kept(other, torch.bfloat16)
            assert narrow(other, torch.bfloat16) is not narrow(other, torch.bfloat16)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, device=DEVICE) / 4)


class Operators:
    """Those that round their weights themselves, with weights in fp32 and all else in bf16."""

    def __init__(self) -> None:
        width, inner, states = 16, 16, 4
        self.norm = [_parameter(width), _parameter(24, width)]
        self.mix1 = [_parameter(inner, 4), _parameter(inner), _parameter(8 + 2 * states, inner),
                     _parameter(inner, 8), _parameter(inner)]  # fmt: skip
        self.out, self.D = _parameter(width, inner), _parameter(inner)
        self.head = _parameter(32, width)
        self.A = -torch.rand(inner, states, device=DEVICE)
        self.x = torch.randn(1, 3, width, device=DEVICE).bfloat16()
        self.proj = torch.randn(1, 3, 2 * inner, device=DEVICE).bfloat16()
        self.proj2 = torch.randn(1, 3, 2 * inner + 2 * states + 2, device=DEVICE).bfloat16()
        self.conv2 = _parameter(inner + 2 * states, 4)
        self.heads = [-torch.rand(2, device=DEVICE), _parameter(2), _parameter(2)]

    def gradients(self) -> list[Tensor]:
        """Of every parameter."""
        y, _ = norm_proj(self.x, None, *self.norm, eps=1e-5, dtype=torch.bfloat16, impl="triton")
        mix: Any = mamba1_mix
        mixed = mix(self.proj, *self.mix1, self.A, self.D, self.out, impl="triton")
        A, D, dt_bias = self.heads
        other = mamba2_mix(self.proj2, self.conv2, None, A, D, dt_bias, None, self.out, n_groups=1,
                           chunk_size=16, impl="triton")  # fmt: skip
        targets = torch.tensor([[1, 2, 3]], device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = linear_cross_entropy(mixed + other, self.head, targets, impl="triton")
        loss = loss + y.float().square().sum()
        parameters = [*self.norm, *self.mix1, self.out, self.D, self.head, self.conv2, D, dt_bias]
        return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("keep", [False, True])
def test_no_gradient_changes(keep: bool) -> None:
    operators, weights = Operators(), NarrowWeights()
    with keep_activations(keep):
        right = operators.gradients()
        for _ in range(2 if keep else 1):
            with weights.in_pass():
                got = operators.gradients()
            assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    # norm_proj's, three of mamba1_mix, of which mamba2_mix shares one, and the head's
    assert len(weights._copies) == (5 if keep else 0)
