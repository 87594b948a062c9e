"""Other projects' operators with the arguments of ours, each importable here or saying why not.

`PEERS[operator][provider]()` imports the peer and returns a function that takes the inputs of
benchmarks/operators.py. Nothing of a peer is changed but how long its autotuner measures: see
`Autotuners`.
"""

import importlib
import inspect
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.interval_attention import put_rows, rows_at

Run = Callable[..., Any]
PEERS: dict[str, dict[str, Callable[[], Run]]] = {}


def _peer(operator: str, provider: str) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
    def register(load: Callable[[], Run]) -> Callable[[], Run]:
        PEERS.setdefault(operator, {})[provider] = load
        return load

    return register


def load(operator: str) -> dict[str, Run | str]:
    """The peers of an operator: a function, or the reason why there is none."""
    found: dict[str, Run | str] = {}
    for provider, importer in PEERS.get(operator, {}).items():
        try:
            found[provider] = importer()
        except (ImportError, RuntimeError) as error:
            found[provider] = f"{type(error).__name__}: {error}"
    return found


def without_cuda_scan() -> None:
    """Let mamba_ssm be imported where its CUDA extension is not built: its Triton part needs none.

    The stand-in has no functions, so whoever calls the CUDA scan fails loudly.
    """
    name = "selective_scan_cuda"
    if name not in sys.modules:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)


def cuda_extension(name: str) -> None:
    """Raise ImportError unless the compiled module can be loaded."""
    if name in sys.modules and not hasattr(sys.modules[name], "__file__"):
        raise ImportError(f"the CUDA extension {name} is not installed")
    importlib.import_module(name)


@_peer("ssd", "mamba_ssm")
def _ssd_mamba() -> Run:
    without_cuda_scan()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None, seq_idx=None):
        # 256 is the chunk of mamba_ssm's own modules.
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, D=D, z=z, dt_bias=dt_bias, dt_softplus=True,
            initial_states=initial_state, seq_idx=seq_idx,
        )  # fmt: skip

    return run


@_peer("mamba3_scan", "mamba_ssm")
def _mamba3_mamba() -> Run:
    """Its Triton kernels for one rank; flash-linear-attention calls the same ones."""
    without_cuda_scan()
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    def run(x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, dt_bias):
        # As its module prepares them: softplus, Δ A, and angles spread over heads.
        dt = F.softplus(dt + dt_bias)
        angles = angles[:, :, None].expand(-1, -1, x.shape[2], -1).float()
        return mamba3_siso_combined(
            Q=C[:, :, 0], K=B[:, :, 0], V=x, ADT=(A * dt).transpose(1, 2),
            DT=dt.transpose(1, 2), Trap=trap.transpose(1, 2), Q_bias=C_bias[:, 0],
            K_bias=B_bias[:, 0], Angles=angles, D=D, Z=z, chunk_size=64,
        )  # fmt: skip

    return run


@_peer("selective_scan", "mamba_ssm")
def _selective_scan_mamba() -> Run:
    without_cuda_scan()
    cuda_extension("selective_scan_cuda")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(x, dt, A, B, C, D=None, z=None, dt_bias=None):
        # Its layout is (B, channels, T): `time_last` asks for inputs that are laid out so.
        x, dt, B, C = (v.transpose(1, 2) for v in (x, dt, B, C))
        z = None if z is None else z.transpose(1, 2)
        y = selective_scan_fn(
            x, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True
        )  # fmt: skip
        return y.transpose(1, 2)

    run.time_last = ("x", "dt", "B", "C", "z")
    return run


@_peer("causal_conv1d", "fla")
def _conv_fla() -> Run:
    from fla.modules.causal_conv1d import causal_conv1d

    def run(x, weight, bias=None):
        return causal_conv1d(x, weight, bias, activation="silu", backend="triton")[0]

    return run


@_peer("causal_conv1d", "causal_conv1d")
def _conv_cuda() -> Run:
    cuda_extension("causal_conv1d_cuda")
    from causal_conv1d import causal_conv1d_fn

    def run(x, weight, bias=None, seq_idx=None):
        y = causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation="silu")
        return y.transpose(1, 2)

    return run


@_peer("rms_norm", "mamba_ssm")
def _norm_mamba() -> Run:
    without_cuda_scan()
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight: rms_norm_fn(x, weight, None, eps=1e-5)


@_peer("rms_norm", "fla")
def _norm_fla() -> Run:
    from fla.modules.norm.layernorm import rms_norm

    return lambda x, weight: rms_norm(x, weight, None, eps=1e-5)


@_peer("gated_rms_norm", "mamba_ssm")
def _gated_norm_mamba() -> Run:
    without_cuda_scan()
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    def run(x, weight, gate, group_size=None):
        return rmsnorm_fn(
            x, weight, None, z=gate, eps=1e-5, group_size=group_size, norm_before_gate=False
        )

    return run


@_peer("gated_rms_norm", "fla")
def _gated_norm_fla() -> Run:
    from fla.modules.norm.layernorm_gated import rmsnorm_fn

    def run(x, weight, gate, group_size=None):
        return rmsnorm_fn(
            x, weight, None, z=gate, eps=1e-5, group_size=group_size, norm_before_gate=False
        )

    return run


@_peer("add_rms_norm", "mamba_ssm")
def _add_norm_mamba() -> Run:
    without_cuda_scan()
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    def run(x, residual, weight):
        return rms_norm_fn(
            x, weight, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True
        )

    return run


@_peer("add_rms_norm", "fla")
def _add_norm_fla() -> Run:
    from fla.modules.norm.layernorm import rms_norm

    def run(x, residual, weight):
        return rms_norm(
            x, weight, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True
        )

    return run


@_peer("linear_cross_entropy", "fla")
def _loss_fla() -> Run:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return lambda hidden, weight, targets: fused_linear_cross_entropy_loss(hidden, targets, weight)


@_peer("linear_cross_entropy", "torch")
def _loss_torch() -> Run:
    def run(hidden, weight, targets):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    return run


@_peer("mixer", "mamba_ssm")
def _mixer_mamba() -> Run:
    without_cuda_scan()
    cuda_extension("causal_conv1d_cuda")
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    def run(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, out_weight, head_dim):
        return mamba_split_conv1d_scan_combined(
            projected, conv_weight, conv_bias, dt_bias, A, D, chunk_size=256, activation="silu",
            rmsnorm_weight=norm_weight, rmsnorm_eps=1e-5, outproj_weight=out_weight,
            headdim=head_dim, ngroups=1, norm_before_gate=False,
        )  # fmt: skip

    return run


@_peer("ssd_update", "mamba_ssm")
def _update_mamba() -> Run:
    without_cuda_scan()
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def run(proj, state, A_log, D, dt_bias, n_groups, unused):
        _, heads, head_dim, states = state.shape
        inner, grouped = heads * head_dim, n_groups * states
        z, x, B, C, dt = proj.split([inner, inner, grouped, grouped, heads], dim=-1)
        x, z = (v.unflatten(-1, (heads, head_dim)) for v in (x, z))
        B, C = (v.unflatten(-1, (n_groups, states)) for v in (B, C))
        # Strides of zero tell it that dt, A, D and dt_bias belong to a head, not to a channel.
        A = -torch.exp(A_log)[:, None, None].expand(heads, head_dim, states)
        dt, D, dt_bias = (v[..., None].expand(*v.shape, head_dim) for v in (dt, D, dt_bias))
        y = selective_state_update(
            state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True
        )
        return y.flatten(1), state

    return run


def _transformers_experts(w_in: Tensor, w_out: Tensor) -> Any:
    """transformers' module of Jamba's experts, made without its constructor's weights."""
    from transformers.models.jamba.modeling_jamba import JambaExperts

    module = JambaExperts.__new__(JambaExperts)
    torch.nn.Module.__init__(module)
    module.num_experts, module.act_fn = w_in.shape[0], F.silu
    # Plain tensors, so that gradients flow to the inputs themselves.
    vars(module).update(gate_up_proj=w_in, down_proj=w_out, has_gate=True, has_bias=False,
                        is_transposed=False, is_concatenated=True, has_post_expert_norm=False,
                        _is_expert_parallel=False)  # fmt: skip
    return module


def _of_tokens(forward: Callable[..., Tensor]) -> Run:
    def run(x, experts, weights, w_in, w_out):
        module = _transformers_experts(w_in, w_out)
        rows = (v.flatten(0, 1) for v in (x, experts, weights.to(x.dtype)))
        return forward(module, *rows).view_as(x)

    return run


@_peer("moe_experts", "transformers, eager")
def _experts_eager() -> Run:
    from transformers.models.jamba.modeling_jamba import JambaExperts

    # The module's own loop stands inside a decorator that chooses another implementation.
    run: Any = _of_tokens(inspect.unwrap(JambaExperts.forward))
    run.waits = True  # for the GPU, to learn which experts are hit
    return run


@_peer("moe_experts", "transformers, grouped_mm")
def _experts_grouped() -> Run:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return _of_tokens(grouped_mm_experts_forward)


@_peer("interval_attention", "torch, sdpa with a mask")
def _masked_attention() -> Run:
    def run(q, k, v, low, high, places=None):
        if places is not None:
            return put_rows(run(rows_at(q, places), k, v, low, high), places, q.shape[1])
        key = torch.arange(k.shape[1], device=q.device)
        mask = (key >= low[..., None]) & (key <= high[..., None])
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None]).transpose(1, 2)

    return run


@_peer("interval_attention_step", "torch, sdpa with a mask")
def _masked_step() -> Run:
    def run(q, k, v, keys, values, length):
        rows = torch.arange(len(keys), device=q.device)
        keys[rows, length], values[rows, length] = k, v
        mask = torch.arange(keys.shape[1], device=q.device) <= length[:, None]
        heads = (q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None])[:, :, 0]

    return run


class Autotuners:
    """The peers' Triton autotuners: candidates are compiled in parallel and measured briefly.

    Their own search compiles one candidate after another, minutes for one shape. What is chosen is
    theirs: the fastest of their candidates on the first inputs of a key. A kernel's first key tries
    all of them, further keys the three that were fastest there. Choices are kept in a file, so that
    later runs compile one candidate.
    """

    def __init__(self, choices: Path) -> None:
        self.path = choices
        self.known: dict[str, dict[str, Any]] = {}
        if choices.exists():
            self.known = json.loads(choices.read_text())

    def _tuners(self) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for module in sorted(m for m in sys.modules if m.split(".")[0] in ("mamba_ssm", "fla")):
            for name, value in vars(sys.modules[module]).items():
                # A heuristic may wrap the autotuner.
                while value is not None and not isinstance(getattr(value, "configs", None), list):
                    value = vars(value).get("fn") if hasattr(value, "__dict__") else None
                if value is not None and id(value) not in seen and hasattr(value, "base_fn"):
                    seen.add(id(value))
                    yield f"{value.base_fn.__module__}.{name}", value

    @staticmethod
    def _key(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        given = {**dict(zip(tuner.arg_names, args, strict=False)), **kwargs}
        given = {name: v for name, v in given.items() if name in tuner.arg_names}
        values = [given[k] for k in tuner.keys if k in given]
        return tuple(values + [str(v.dtype) for v in given.values() if isinstance(v, Tensor)])

    def _restore(self, name: str, tuner: Any) -> None:
        known = self.known.get(name)
        if known is None:
            return
        by_options = {json.dumps(c.all_kwargs(), sort_keys=True): c for c in tuner.configs}
        for key, options in known["chosen"].items():
            tuner.cache[tuple(json.loads(key))] = by_options[json.dumps(options, sort_keys=True)]
        tuner.configs = [by_options[json.dumps(o, sort_keys=True)] for o in known["fastest"]]

    def compile_only(self, part: int, parts: int) -> None:
        """From now on the peers' autotuned kernels compile their candidates and do not run.

        Of the candidates that no file decides, this process takes every `parts`-th.
        """
        count = 0
        for name, tuner in self._tuners():
            self._restore(name, tuner)
            done: set[tuple[Any, ...]] = set()

            def run(*args: Any, _tuner: Any = tuner, _done: set = done, **kwargs: Any) -> None:
                nonlocal count
                key = self._key(_tuner, args, kwargs)
                if key in _done:
                    return
                _done.add(key)
                _tuner.nargs = dict(zip(_tuner.arg_names, args, strict=False))
                chosen = _tuner.cache.get(key)
                candidates = [chosen] if chosen else _tuner.prune_configs(kwargs)
                _tuner.best_config = candidates[0]  # some callers read it
                for config in candidates:
                    count += 1
                    if count % parts == part:
                        options = {**kwargs, "warmup": True, **config.all_kwargs()}
                        try:
                            _tuner.fn.run(*args, **options)
                        except Exception as error:  # a candidate too large for this GPU
                            print(f"{_tuner.base_fn.__name__}: {type(error).__name__}")

            tuner.run = run

    def measure_briefly(self) -> None:
        """From now on undecided candidates are timed for a few milliseconds each."""
        for name, tuner in self._tuners():
            self._restore(name, tuner)
            tuner.__dict__["do_bench"] = _brief

    def save(self) -> None:
        """Add what the autotuners have chosen to the file."""
        for name, tuner in self._tuners():
            if not tuner.cache:
                continue
            ranked = sorted(getattr(tuner, "configs_timings", {}).items(), key=lambda kv: kv[1])
            fastest = [config.all_kwargs() for config, _ in ranked[:3]]
            known = self.known.setdefault(name, {"chosen": {}, "fastest": fastest})
            for key, config in tuner.cache.items():
                known["chosen"][json.dumps(key)] = config.all_kwargs()
                if config.all_kwargs() not in known["fastest"]:
                    known["fastest"].append(config.all_kwargs())
        self.path.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")


def _brief(run: Callable[[], object], quantiles: Any = None) -> list[float]:
    """Best of 8 calls in ms, as often as there are quantiles."""
    for _ in range(2):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    best = min(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return [best] * 3
