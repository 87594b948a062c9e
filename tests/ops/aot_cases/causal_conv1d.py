"""Representative launches of the convolution's kernels."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops import causal_conv1d


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    wide = torch.empty(2, 300, 3352, dtype=torch.bfloat16, requires_grad=True)
    x = wide[..., 1536:3328]
    weight = torch.empty(1792, 4, requires_grad=True)
    bias = torch.empty(1792, requires_grad=True)
    state = torch.empty(2, 3, 1792, dtype=torch.bfloat16, requires_grad=True)

    def plain() -> None:
        causal_conv1d(x, weight, bias, activation="silu", impl="triton").sum().backward()

    yield "plain", plain

    def packed() -> None:
        y, final = causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=state,
            seq_idx=torch.zeros(2, 300, dtype=torch.int64),
            mask=torch.ones(2, 300, dtype=torch.bool),
            return_final_state=True,
            impl="triton",
        )
        (y.sum() + final.sum()).backward()

    yield "packed, padded, with states", packed

    def documents() -> None:
        y, final = causal_conv1d(
            x[:1],
            weight,
            initial_state=state,
            cu_seqlens=torch.tensor([0, 100, 300]),
            return_final_state=True,
            impl="triton",
        )
        (y.sum() + final.sum()).backward()

    yield "a state per document", documents
