"""Representative launches of the kernels of routers and experts."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops.moe import moe_experts, moe_route


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "experts, many rows", lambda: _experts(4096, 768, 2048, 16, 2, torch.bfloat16)
    yield "experts, few rows", lambda: _experts(32, 768, 2048, 16, 2, torch.bfloat16)
    yield "experts, fp32", lambda: _experts(300, 192, 256, 6, 2, torch.float32)
    yield "experts, odd sizes", lambda: _experts(4096, 200, 100, 6, 3, torch.float16, gated=False)
    yield "one token", lambda: _experts(1, 768, 2048, 16, 2, torch.bfloat16)
    yield "ones", lambda: _experts(1, 1, 1, 1, 1, torch.float32, gated=False)
    yield "router, softmax", lambda: _route(16, 2)
    yield "router, renormalised", lambda: _route(40, 8, renormalise=True)
    yield (
        "router, sigmoid",
        lambda: _route(128, 6, kind="sigmoid", renormalise=True, scale=2.5, groups=8, top_groups=4),
    )


def _experts(
    tokens: int, size: int, inner: int, experts: int, top_k: int, dtype: torch.dtype,
    gated: bool = True,
) -> None:  # fmt: skip
    x = torch.empty(tokens, size, dtype=dtype)
    chosen = torch.zeros(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k)
    w_in = torch.empty(experts, inner * (2 if gated else 1), size, dtype=dtype)
    w_out = torch.empty(experts, size, inner, dtype=dtype)
    leaves = [x, weights, w_in, w_out]
    activation = "silu" if gated else "relu2"
    for grad in (False, True):
        for leaf in leaves:
            leaf.requires_grad_(grad)
        y = moe_experts(x, chosen, weights, w_in, w_out, activation=activation, gated=gated,
                        impl="triton")  # fmt: skip
    y.sum().backward()


def _route(experts: int, top_k: int, **options: object) -> None:
    logits = torch.empty(4096, experts, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.empty(experts) if options.get("kind") == "sigmoid" else None
    mask = torch.empty(4096, dtype=torch.bool)
    routing = moe_route(logits, top_k, bias=bias, mask=mask, impl="triton", **options)
    routing.weights.sum().backward()
