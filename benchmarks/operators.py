"""The operators that are timed: inputs, the call, and the least work that it can be done with.

Shapes are dicts of the letters of docs/glossary.md (B batch, T tokens, H heads, P head size,
N state, G groups, I channels, V vocabulary). Inputs are drawn as a model at initialisation would
produce them: step sizes between 0.001 and 0.1, decay rates between 1 and 16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf import ops
from ssm_hf.ops.interval_attention import interval_attention, interval_attention_step
from ssm_hf.ops.moe import moe_experts, moe_route
from ssm_hf.ops.ssd.step import mamba2_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Shape = dict[str, int]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The least a call has to do: bytes to and from memory, operations on each unit of the chip."""

    moved: float
    matmul: float = 0.0
    exps: float = 0.0

    def limits(self, ceilings: dict[str, float], processors: int) -> dict[str, float]:
        """Milliseconds that each resource needs on its own.

        Copy and matmul rates are measured in the same run. An exponential takes a slot of the
        multifunction unit: 16 a clock and multiprocessor, at 1.98 GHz.
        """
        return {
            "memory": self.moved / ceilings["copy_tb_s"] * 1e-9,
            "matmul": self.matmul / ceilings["bf16_tflop_s"] * 1e-9,
            "exp": self.exps / (processors * 16 * 1.98e9) * 1e3,
        }


@dataclass(frozen=True)
class Operator:
    """One public operator of ours.

    `draw(shape, dtype)` makes the inputs, `run(inputs, impl)` calls the operator,
    `work(shape, itemsize, backward)` is the least work, `per_row` names the inputs that have the
    batch as their first dimension. `gradients` are the inputs whose gradients are formed.
    """

    draw: Callable[[Shape, torch.dtype], Inputs]
    run: Callable[[Inputs, str], Any]
    work: Callable[[Shape, int, bool], Work]
    per_row: tuple[str, ...]
    gradients: tuple[str, ...]


def _normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def _dt_bias(count: int) -> Tensor:
    """Biases whose softplus is spread evenly, in the logarithm, over 0.001 to 0.1."""
    low, high = math.log(1e-3), math.log(0.1)
    dt = torch.exp(low + (high - low) * torch.rand(count, device=DEVICE))
    return dt + torch.log(-torch.expm1(-dt))


def _documents(shape: Shape) -> dict[str, Tensor]:
    """`seq_idx` of documents of random lengths, none of them empty, or nothing without packing."""
    count = shape.get("documents", 1)
    if count == 1:
        return {}
    generator = torch.Generator().manual_seed(count)
    cuts = torch.randperm(shape["T"] - 1, generator=generator)[: count - 1].sort().values + 1
    lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([shape["T"]]))
    seq_idx = torch.repeat_interleave(torch.arange(count), lengths)
    return {"seq_idx": seq_idx.to(torch.int32).expand(shape["B"], -1).contiguous().to(DEVICE)}


def _draw_ssd(s: Shape, dtype: torch.dtype) -> Inputs:
    B, T, H, P, N, G = (s[k] for k in "BTHPNG")
    return {
        "x": _normal(B, T, H, P, dtype=dtype),
        "dt": _normal(B, T, H, dtype=dtype, scale=0.5),
        "A": -(1 + 15 * torch.rand(H, device=DEVICE)),
        "B": _normal(B, T, G, N, dtype=dtype),
        "C": _normal(B, T, G, N, dtype=dtype),
        "D": torch.ones(H, device=DEVICE),
        "dt_bias": _dt_bias(H),
        **_documents(s),
    }


def _ssd_work(s: Shape, item: int, backward: bool) -> Work:
    """Chunks of 64; scores are formed once per group, head by head only what depends on the head.

    With gradients, x, B, C and dt are read twice, y and its gradient pass once. fp32 products cost
    three tf32 products, at half the rate of bf16 each.
    """
    B, T, H, P, N, G = (s[k] for k in "BTHPNG")
    Q, cost = 64, 1 if item == 2 else 6
    x, bc, dt = H * P, 2 * G * N, H
    moved = 2 * x + bc + dt
    products = 2 * G * Q * N + H * (2 * Q * P + 4 * N * P)
    if backward:
        moved += 3 * x + 2 * bc + 2 * dt
        products += 6 * G * Q * N + H * (4 * Q * P + 10 * N * P)
    return Work(B * T * moved * item, B * T * products * cost)


def _draw_mamba3(s: Shape, dtype: torch.dtype) -> Inputs:
    """R ranks (1 without mimo_x, mimo_z, mimo_o), S = N / 4 pairs of states turn."""
    B, T, H, P, N, G, R = (s[k] for k in "BTHPNGR")
    inputs = {
        "x": _normal(B, T, H, P, dtype=dtype),
        "dt": _normal(B, T, H, dtype=dtype, scale=0.5),
        "A": -(1 + torch.rand(B, T, H, device=DEVICE)),
        "trap": _normal(B, T, H, dtype=dtype),
        "B": _normal(B, T, R, G, N, dtype=dtype),
        "C": _normal(B, T, R, G, N, dtype=dtype),
        "angles": _normal(B, T, N // 4, dtype=dtype),
        "D": torch.ones(H, device=DEVICE),
        "z": _normal(B, T, H, P, dtype=dtype),
        "B_bias": torch.ones(H, R, N, device=DEVICE),
        "C_bias": torch.ones(H, R, N, device=DEVICE),
        "dt_bias": _dt_bias(H),
    }
    if R > 1:
        scales = {"mimo_x": 1 / R, "mimo_z": 1.0, "mimo_o": 1 / R}
        inputs |= {name: torch.full((H, R, P), v, device=DEVICE) for name, v in scales.items()}
    return inputs


def _mamba3_work(s: Shape, item: int, backward: bool) -> Work:
    """Chunks of 64 rows (tokens times ranks); queries and keys differ from head to head."""
    B, T, H, P, N, G, R = (s[k] for k in "BTHPNGR")
    Q, cost = 64, 1 if item == 2 else 6
    token = 2 * R * G * N + 4 * H + N // 4
    moved = 3 * H * P + token
    products = R * H * (2 * Q * N + 2 * Q * P + 4 * N * P)
    if backward:
        moved += 5 * H * P + 2 * token
        products += R * H * (6 * Q * N + 4 * Q * P + 10 * N * P)
    turns = 2 * H * (N // 4)
    return Work(B * T * moved * item, B * T * products * cost, B * T * turns)


def _draw_selective_scan(s: Shape, dtype: torch.dtype) -> Inputs:
    B, T, I, N = (s[k] for k in "BTIN")
    return {
        "x": _normal(B, T, I, dtype=dtype),
        "dt": _normal(B, T, I, dtype=dtype, scale=0.5),
        "A": -torch.arange(1, N + 1, dtype=torch.float32, device=DEVICE).repeat(I, 1),
        "B": _normal(B, T, N, dtype=dtype),
        "C": _normal(B, T, N, dtype=dtype),
        "D": torch.ones(I, device=DEVICE),
        "z": _normal(B, T, I, dtype=dtype),
        "dt_bias": _dt_bias(I),
        **_documents(s),
    }


def _selective_scan_work(s: Shape, item: int, backward: bool) -> Work:
    """A decay per channel and state, and once more for the gradients; softplus and the gate."""
    B, T, I, N = (s[k] for k in "BTIN")
    moved, exps = 4 * I + 2 * N, I * N + 2 * I
    if backward:
        moved, exps = moved + 7 * I + 4 * N, 2 * exps
    return Work(B * T * moved * item, exps=B * T * exps)


def _draw_conv(s: Shape, dtype: torch.dtype) -> Inputs:
    B, T, I, K = (s[k] for k in "BTIK")
    return {
        "x": _normal(B, T, I, dtype=dtype),
        "weight": _normal(I, K, dtype=dtype, scale=0.5),
        "bias": _normal(I, dtype=dtype, scale=0.1),
        **_documents(s),
    }


def _elementwise(reads_writes: int, gradients: int) -> Callable[[Shape, int, bool], Work]:
    """Work of an operator that is bound by the passes over (B, T, I) tensors it has to make."""

    def work(s: Shape, item: int, backward: bool) -> Work:
        passes = reads_writes + (gradients if backward else 0)
        return Work(s["B"] * s["T"] * s["I"] * passes * item)

    return work


def _draw_norm(s: Shape, dtype: torch.dtype) -> Inputs:
    return {
        "x": _normal(s["B"], s["T"], s["I"], dtype=dtype),
        "weight": 1 + _normal(s["I"], scale=0.1),
    }


def _draw_gated_norm(s: Shape, dtype: torch.dtype) -> Inputs:
    gate = _normal(s["B"], s["T"], s["I"], dtype=dtype)
    return {**_draw_norm(s, dtype), "gate": gate, "group_size": s["I"] // s.get("G", 1)}


def _draw_add_norm(s: Shape, dtype: torch.dtype) -> Inputs:
    residual = _normal(s["B"], s["T"], s["I"])
    return {**_draw_norm(s, dtype), "residual": residual}


def _add_norm_work(s: Shape, item: int, backward: bool) -> Work:
    """x and the fp32 stream in, y and the stream out; two gradients in, two out."""
    passes = 2 * (item + 4) + (item + 3 * 4 + item if backward else 0)
    return Work(s["B"] * s["T"] * s["I"] * passes)


def _draw_loss(s: Shape, dtype: torch.dtype) -> Inputs:
    tokens = s["B"] * s["T"]
    return {
        "hidden": _normal(tokens, s["D"], dtype=dtype),
        "weight": _normal(s["V"], s["D"], dtype=dtype, scale=s["D"] ** -0.5),
        "targets": torch.randint(s["V"], (tokens,), device=DEVICE),
    }


def _loss_work(s: Shape, item: int, backward: bool) -> Work:
    """One product of tokens, width and vocabulary; the gradients of both sides are one each."""
    tokens = s["B"] * s["T"]
    moved = (tokens + s["V"]) * s["D"] * item * (2 if backward else 1)
    return Work(moved, 2 * tokens * s["D"] * s["V"] * (3 if backward else 1))


def _draw_mixer(s: Shape, dtype: torch.dtype) -> Inputs:
    H, P, N, G, K, width = (s[k] for k in "HPNGKD")
    inner, channels = H * P, H * P + 2 * G * N
    return {
        "projected": _normal(s["B"], s["T"], inner + channels + H, dtype=dtype),
        "conv_weight": _normal(channels, K, dtype=dtype, scale=0.5),
        "conv_bias": _normal(channels, dtype=dtype, scale=0.1),
        "A": -(1 + 15 * torch.rand(H, device=DEVICE)),
        "D": torch.ones(H, device=DEVICE),
        "dt_bias": _dt_bias(H),
        "norm_weight": torch.ones(inner, device=DEVICE),
        "out_weight": _normal(width, inner, dtype=dtype, scale=inner**-0.5),
        "head_dim": P,
    }


def _mixer(inputs: Inputs, impl: str) -> Tensor:
    """Convolution, scan, gated norm and out_proj, as the Mamba-2 layer calls them (one group)."""
    projected, A = inputs["projected"], inputs["A"]
    heads, head_dim = A.shape[0], inputs["head_dim"]
    inner, channels = heads * head_dim, inputs["conv_weight"].shape[0]
    z, mixed, dt = projected.split([inner, channels, heads], dim=-1)
    mixed = ops.causal_conv1d(
        mixed, inputs["conv_weight"], inputs["conv_bias"], activation="silu", impl=impl
    )
    states = (channels - inner) // 2
    x, B, C = mixed.split([inner, states, states], dim=-1)
    y = ops.ssd(
        x.unflatten(-1, (heads, head_dim)), dt, A, B[:, :, None], C[:, :, None],
        D=inputs["D"], dt_bias=inputs["dt_bias"], dt_softplus=True, impl=impl,
    )  # fmt: skip
    y = ops.rms_norm(y.flatten(2), inputs["norm_weight"], eps=1e-5, gate=z, impl=impl)
    return F.linear(y, inputs["out_weight"])


def _mixer_work(s: Shape, item: int, backward: bool) -> Work:
    """Everything fused: the projection's output in, the layer's out, and the scan's products."""
    inner, tokens = s["H"] * s["P"], s["B"] * s["T"]
    proj, width = 2 * inner + 2 * s["G"] * s["N"] + s["H"], s["D"]
    moved = tokens * (proj + width) * item
    matmul = _ssd_work(s, item, backward).matmul
    matmul += 2 * tokens * inner * width * (3 if backward else 1)
    return Work(moved + (tokens * (2 * proj + width) * item if backward else 0), matmul)


def _draw_update(s: Shape, dtype: torch.dtype) -> Inputs:
    B, H, P, N, G = (s[k] for k in "BHPNG")
    channels = H * P + 2 * G * N
    return {
        "proj": _normal(B, H * P + channels + H, dtype=dtype),
        "state": _normal(B, H, P, N),
        "A_log": torch.log(1 + 15 * torch.rand(H, device=DEVICE)),
        "D": torch.ones(H, device=DEVICE),
        "dt_bias": _dt_bias(H),
        "n_groups": G,
        "unused": {
            "conv_state": torch.zeros(B, 3, channels, dtype=dtype, device=DEVICE),
            "conv_weight": torch.zeros(channels, 4, dtype=dtype, device=DEVICE),
            "tickets": torch.zeros(B, G, dtype=torch.int32, device=DEVICE),
        },
    }


def _update(inputs: Inputs, impl: str) -> tuple[Tensor, Tensor]:
    """One token's step size, recurrence, skip and gate; the state is written in place."""
    unused, rows = inputs["unused"], inputs["state"].shape[0]
    y = mamba2_step(
        inputs["proj"], unused["conv_state"][:rows], inputs["state"], unused["tickets"][:rows],
        conv_weight=unused["conv_weight"], conv_bias=None, dt_bias=inputs["dt_bias"],
        A_log=inputs["A_log"], D=inputs["D"], n_groups=inputs["n_groups"], convolved=True,
        impl=impl,
    )  # fmt: skip
    return y, inputs["state"]


def _update_work(s: Shape, item: int, backward: bool) -> Work:
    """The fp32 state in and out, and the inputs of one token."""
    small = 3 * s["H"] * s["P"] + 2 * s["G"] * s["N"] + s["H"]
    return Work(s["B"] * (2 * s["H"] * s["P"] * s["N"] * 4 + small * item))


def _draw_experts(s: Shape, dtype: torch.dtype) -> Inputs:
    """Tokens sent by a router at initialisation: loads differ by a few percent."""
    B, T, D, I, E, k = (s[key] for key in "BTDIEk")
    x = _normal(B, T, D, dtype=dtype)
    routing = moe_route(F.linear(x, _normal(E, D, dtype=dtype, scale=D**-0.5)), k)
    return {
        "x": x,
        "experts": routing.experts,
        "weights": routing.weights.detach(),
        "w_in": _normal(E, 2 * I, D, dtype=dtype, scale=D**-0.5),
        "w_out": _normal(E, D, I, dtype=dtype, scale=I**-0.5),
    }


def _experts_work(s: Shape, item: int, backward: bool) -> Work:
    """Three products a slot, and two more for the gradients of each; weights that are hit once."""
    B, T, D, I, E, k = (s[key] for key in "BTDIEk")
    times = 3 if backward else 1
    moved = (2 * B * T * D + 3 * min(E, B * T * k) * I * D) * item * times
    return Work(moved, 2 * B * T * k * 3 * D * I * times * (1 if item == 2 else 6))


def _draw_route(s: Shape, dtype: torch.dtype) -> Inputs:
    return {"logits": _normal(s["B"], s["T"], s["E"], dtype=dtype), "top_k": s["k"]}


def _route_work(s: Shape, item: int, backward: bool) -> Work:
    """Logits in, weights and numbers out; with gradients once more, and the logits' gradient."""
    moved = s["E"] * item + s["k"] * 12
    if backward:
        moved += 2 * s["E"] * item + s["k"] * 12
    return Work(s["B"] * s["T"] * moved)


def _intervals(s: Shape, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal intervals of documents, within a `window` if there is one; of `percent` of the tokens,
    chosen at random, if not of all. Where they stay in their `places` these come too, the others
    behind them, which see nothing."""
    T, device = s["T"], DEVICE
    high = torch.arange(T, device=device).expand(rows, -1)
    low = torch.zeros_like(high)
    if "documents" in s:
        new = torch.diff(_documents({**s, "B": rows})["seq_idx"], dim=1, prepend=low[:, :1].int())
        low = torch.where(new != 0, high, 0).cummax(dim=1).values
    if "window" in s:
        low = torch.maximum(low, high - (s["window"] - 1))
    if "percent" in s:
        generator = torch.Generator(device).manual_seed(s["percent"])
        order = torch.rand(rows, T, device=device, generator=generator).argsort(dim=1)
        count = T * s["percent"] // 100
        chosen = order[:, :count].sort(dim=1).values
        low, high = low.gather(1, chosen), high.gather(1, chosen)
        if "placed" in s:
            blind = low.new_zeros(rows, T - count)
            places = torch.cat([chosen, order[:, count:]], dim=1)
            return torch.cat([low, blind + 1], dim=1), torch.cat([high, blind], dim=1), places
    return low.contiguous(), high.contiguous(), None


def _draw_attention(s: Shape, dtype: torch.dtype) -> Inputs:
    B, T, H, G, P = (s[k] for k in "BTHGP")
    low, high, places = _intervals(s, B)
    return {
        "q": _normal(B, low.shape[1], H, P, dtype=dtype),
        "k": _normal(B, T, G, P, dtype=dtype),
        "v": _normal(B, T, G, P, dtype=dtype),
        "low": low,
        "high": high,
        **({} if places is None else {"places": places}),
    }


def _attention_work(s: Shape, item: int, backward: bool) -> Work:
    """Two products a pair of a query and a key that it sees, and five more for the gradients."""
    B, T, H, G, P = (s[k] for k in "BTHGP")
    low, high, _ = _intervals(s, 1)
    queries, pairs = low.shape[1], B * H * int((high - low + 1).sum())
    moved = B * 2 * (queries * H + T * G) * P * item
    cost = 1 if item == 2 else 6
    if backward:
        return Work(3 * moved, 14 * P * pairs * cost, 2 * pairs)
    return Work(moved, 4 * P * pairs * cost, pairs)


def _draw_attention_step(s: Shape, dtype: torch.dtype) -> Inputs:
    """A cache of T slots that is full but for the token's own."""
    B, T, H, G, P = (s[k] for k in "BTHGP")
    return {
        "q": _normal(B, H, P, dtype=dtype),
        "k": _normal(B, G, P, dtype=dtype),
        "v": _normal(B, G, P, dtype=dtype),
        "keys": _normal(B, T, G, P, dtype=dtype),
        "values": _normal(B, T, G, P, dtype=dtype),
        "length": torch.full((B,), T - 1, device=DEVICE),
    }


def _attention_step_work(s: Shape, item: int, _: bool) -> Work:
    B, T, H, G, P = (s[k] for k in "BTHGP")
    return Work(2 * B * (T * G + H) * P * item, 0, B * T * H)


def _forward(op: Callable[..., Any], **options: Any) -> Callable[[Inputs, str], Any]:
    return lambda inputs, impl: op(**inputs, **options, impl=impl)


OPERATORS = {
    "ssd": Operator(
        _draw_ssd,
        _forward(ops.ssd, dt_softplus=True),
        _ssd_work,
        ("x", "dt", "B", "C", "seq_idx"),
        ("x", "dt", "A", "B", "C", "D", "dt_bias"),
    ),
    "mamba3_scan": Operator(
        _draw_mamba3,
        _forward(ops.mamba3_scan, dt_softplus=True),
        _mamba3_work,
        ("x", "dt", "A", "trap", "B", "C", "angles", "z"),
        ("x", "dt", "A", "trap", "B", "C", "angles", "D", "z", "B_bias", "C_bias", "dt_bias"),
    ),
    "selective_scan": Operator(
        _draw_selective_scan,
        _forward(ops.selective_scan, dt_softplus=True),
        _selective_scan_work,
        ("x", "dt", "B", "C", "z", "seq_idx"),
        ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"),
    ),
    "causal_conv1d": Operator(
        _draw_conv,
        _forward(ops.causal_conv1d, activation="silu"),
        # y out for x in; the gradient reads x and dy and writes dx
        _elementwise(2, 3),
        ("x", "seq_idx"),
        ("x", "weight", "bias"),
    ),
    "rms_norm": Operator(
        _draw_norm, _forward(ops.rms_norm, eps=1e-5), _elementwise(2, 3), ("x",), ("x", "weight")
    ),
    "gated_rms_norm": Operator(
        _draw_gated_norm,
        _forward(ops.rms_norm, eps=1e-5),
        # x, gate, y; the gradient reads x, gate and dy and writes two
        _elementwise(3, 5),
        ("x", "gate"),
        ("x", "weight", "gate"),
    ),
    "add_rms_norm": Operator(
        _draw_add_norm,
        _forward(ops.add_rms_norm, eps=1e-5),
        _add_norm_work,
        ("x", "residual"),
        ("x", "weight", "residual"),
    ),
    "linear_cross_entropy": Operator(
        _draw_loss,
        _forward(ops.linear_cross_entropy),
        _loss_work,
        # A mean over all tokens has no part that depends on a few of them alone.
        (),
        ("hidden", "weight"),
    ),
    "mixer": Operator(
        _draw_mixer,
        _mixer,
        _mixer_work,
        ("projected",),
        ("projected", "conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight", "out_weight"),
    ),
    "interval_attention": Operator(
        _draw_attention,
        _forward(interval_attention),
        _attention_work,
        ("q", "k", "v", "low", "high", "places"),
        ("q", "k", "v"),
    ),
    "interval_attention_step": Operator(
        _draw_attention_step,
        _forward(interval_attention_step),
        _attention_step_work,
        ("q", "k", "v", "keys", "values", "length"),
        (),
    ),
    "moe_experts": Operator(
        _draw_experts,
        _forward(moe_experts),
        _experts_work,
        ("x", "experts", "weights"),
        ("x", "weights", "w_in", "w_out"),
    ),
    "moe_route": Operator(
        _draw_route,
        lambda inputs, impl: moe_route(**inputs, impl=impl).weights,
        _route_work,
        ("logits",),
        ("logits",),
    ),
    "ssd_update": Operator(_draw_update, _update, _update_work, ("proj", "state"), ()),
}

BF16, FP32 = torch.bfloat16, torch.float32


def _ssd(B: int, T: int, H: int, P: int, N: int, G: int = 1, **more: int) -> Shape:
    return {"B": B, "T": T, "H": H, "P": P, "N": N, "G": G, **more}


# Shapes that no launch option was chosen for: (name, operator, shape, dtype).
GRID: list[tuple[str, str, Shape, torch.dtype]] = [
    ("grid-scan-prime", "selective_scan", {"B": 3, "T": 2039, "I": 1792, "N": 16}, BF16),
    ("grid-scan-n64", "selective_scan", {"B": 2, "T": 1021, "I": 2048, "N": 64}, BF16),
    ("grid-scan-fp32", "selective_scan", {"B": 4, "T": 2039, "I": 1536, "N": 16}, FP32),
    (
        "grid-scan-100-documents",
        "selective_scan",
        {"B": 1, "T": 16384, "I": 1536, "N": 16, "documents": 100},
        BF16,
    ),
    ("grid-conv-prime", "causal_conv1d", {"B": 3, "T": 4093, "I": 1792, "K": 4}, BF16),
    ("grid-conv-k3", "causal_conv1d", {"B": 4, "T": 2039, "I": 3328, "K": 3}, BF16),
    ("grid-conv-fp32", "causal_conv1d", {"B": 4, "T": 2039, "I": 1792, "K": 4}, FP32),
    (
        "grid-conv-100-documents",
        "causal_conv1d",
        {"B": 1, "T": 16384, "I": 1792, "K": 4, "documents": 100},
        BF16,
    ),
    ("norm-768", "rms_norm", {"B": 8, "T": 2048, "I": 768}, BF16),
    ("norm-2560", "rms_norm", {"B": 8, "T": 2048, "I": 2560}, BF16),
    ("grid-norm-fp32", "rms_norm", {"B": 3, "T": 2039, "I": 1792}, FP32),
    ("gated-norm-1536", "gated_rms_norm", {"B": 8, "T": 2048, "I": 1536}, BF16),
    ("gated-norm-5120", "gated_rms_norm", {"B": 8, "T": 2048, "I": 5120}, BF16),
    ("grid-gated-norm-g8", "gated_rms_norm", {"B": 2, "T": 4093, "I": 8192, "G": 8}, BF16),
    ("add-norm-768", "add_rms_norm", {"B": 8, "T": 2048, "I": 768}, BF16),
    ("add-norm-2560", "add_rms_norm", {"B": 8, "T": 2048, "I": 2560}, BF16),
    ("loss-130m", "linear_cross_entropy", {"B": 8, "T": 2048, "D": 768, "V": 50288}, BF16),
    ("loss-2.7b", "linear_cross_entropy", {"B": 4, "T": 2048, "D": 2560, "V": 50288}, BF16),
]
GRID += [
    ("moe-130m", "moe_experts", {"B": 8, "T": 2048, "D": 768, "I": 2048, "E": 16, "k": 2}, BF16),
    ("moe-52b", "moe_experts", {"B": 8, "T": 2048, "D": 4096, "I": 14336, "E": 16, "k": 2}, BF16),
    ("moe-step-52b", "moe_experts", {"B": 1, "T": 1, "D": 4096, "I": 14336, "E": 16, "k": 2}, BF16),
    ("moe-batch-52b", "moe_experts", {"B": 32, "T": 1, "D": 4096, "I": 14336, "E": 16, "k": 2},
     BF16),
    ("moe-route", "moe_route", {"B": 8, "T": 2048, "E": 16, "k": 2}, BF16),
]  # fmt: skip
GRID += [
    (f"attention-{name}", "interval_attention", {"B": 2, "T": 8192, "H": 12, "G": 12, "P": 64,
     **more}, BF16)
    for name, more in (
        ("packed", {"documents": 8}), ("causal", {}), ("window", {"window": 2048}),
        ("selected", {"window": 2048, "percent": 15}),
        ("placed", {"window": 2048, "percent": 15, "placed": 1}),
    )
]  # fmt: skip
GRID += [
    (f"attention-step-{B}", "interval_attention_step", {"B": B, "T": T, "H": 12, "G": 12, "P": 64},
     BF16)
    for B, T in ((1, 32768), (32, 2048))
]  # fmt: skip
# Time against length, one row.
GRID += [
    (f"length-ssd-{T}", "ssd", _ssd(1, T, 64, 64, 128), BF16) for T in (1024, 4096, 16384, 65536)
]
GRID += [
    (f"length-scan-{T}", "selective_scan", {"B": 1, "T": T, "I": 4096, "N": 16}, BF16)
    for T in (1024, 4096, 16384, 65536)
]
GRID += [
    ("grid-ssd-p128-n16", "ssd", _ssd(4, 2039, 24, 128, 16), BF16),
    ("grid-ssd-p32-n256-g8", "ssd", _ssd(4, 2039, 48, 32, 256, 8), BF16),
    ("grid-ssd-p64-n64-g8", "ssd", _ssd(2, 4093, 112, 64, 64, 8), BF16),
    ("grid-ssd-p128-n128", "ssd", _ssd(2, 4093, 112, 128, 128), BF16),
    ("grid-ssd-p32-n64-short", "ssd", _ssd(2, 509, 48, 32, 64), BF16),
    ("grid-ssd-100-documents", "ssd", _ssd(1, 16384, 48, 64, 128, documents=100), BF16),
    ("grid-ssd-fp32", "ssd", _ssd(4, 2039, 24, 64, 128), FP32),
    ("grid-mamba3-n64", "mamba3_scan", _ssd(4, 2039, 24, 64, 64, R=1), BF16),
    ("grid-mamba3-fp32", "mamba3_scan", _ssd(2, 1021, 24, 64, 128, R=1), FP32),
    ("grid-mamba3-mimo2", "mamba3_scan", _ssd(4, 1021, 24, 64, 128, R=2), BF16),
]
