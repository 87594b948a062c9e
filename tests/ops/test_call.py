"""Operators called past their dispatch."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ssm_hf.ops.launch import call


@torch.library.custom_op("ssm_hf_tests::double", mutates_args=())
def double(x: torch.Tensor, times: int) -> torch.Tensor:
    return times * x


@double.register_fake
def _(x: torch.Tensor, times: int) -> torch.Tensor:
    return torch.empty_like(x)


def _setup(ctx, inputs, output) -> None:
    ctx.times = inputs[1]


double.register_autograd(lambda ctx, g: (g * ctx.times, None), setup_context=_setup)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_gradients_pass_through_the_operator() -> None:
    x = torch.ones(3, requires_grad=True)
    call(double, x, 5).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [5, 5, 5]


def test_plain_inference_runs_the_function_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the operator was dispatched")

    monkeypatch.setattr(type(double), "__call__", fail)
    with torch.no_grad():
        assert call(double, torch.ones(2), 3).tolist() == [3, 3]
    with pytest.raises(AssertionError, match="dispatched"):
        call(double, torch.ones(2), 3)


@torch.no_grad()
def test_whoever_looks_on_sees_the_operator() -> None:
    with Operators() as operators:
        call(double, torch.ones(2), 3)
    assert "ssm_hf_tests.double.default" in operators.names
    with FakeTensorMode():
        assert call(double, torch.ones(2), 3).shape == (2,)
    graph = make_fx(lambda x: call(double, x, 3))(torch.ones(2))
    assert "ssm_hf_tests.double" in graph.code
    compiled = torch.compile(lambda x: call(double, x, 3), backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3, 3]
