"""Times generation: the replayed step, whole calls, prefill, and the same with mamba_ssm.

    python -m benchmarks.generation [--models mamba2-130m,...] [--batches 1,64] [--peers]
    python -m benchmarks.generation --models taipan-130m,mamba2-130m --contexts 2048,32768,131072

Weights are random, in bf16, with the shapes of configs/model/*.json. Before a time is printed the
tokens of a small model of the same family are compared in fp32: captured steps, steps one by one,
whole forward passes without a cache and transformers' loop must agree.

Measures: `ms_per_token` is a whole `generate` call, prefill and host included, by its new tokens;
`added_ms_per_token` what a token adds to a call; `replay_ms` the captured step alone, back to back;
`first_token_ms` a call for one token; `transformers_loop_ms_per_token` what one adds to a call in
transformers' loop. With `--contexts`, of one row with so many tokens behind it:
`step_ms`, what a token adds to a call that goes on from the cache, and the size of that cache.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

import ssm_hf
from benchmarks.common import RESULTS, ROOT, append, record, wall_ms
from benchmarks.peers import without_cuda_scan
from ssm_hf import RecurrentCache
from ssm_hf.generation.graphs import forget_graphs, graphs_of

MODELS = ("mamba2-130m", "mamba-130m", "mamba2-2.7b", "mamba-2.8b")
SAMPLED = {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8}


class Unknown(LogitsProcessor):
    """Changes nothing, but sends a request to transformers' loop."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


THEIR_LOOP = {"logits_processor": LogitsProcessorList([Unknown()])}


def case_of(name: str, batch: int) -> str:
    """`mamba-2.8b`, 64 -> `generate-2.7b-b64-mamba`, as benchmarks/targets.json names it."""
    family, _, size = name.rpartition("-")
    return f"generate-{size.replace('2.8b', '2.7b')}-b{batch}-{family}"


def build(name: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(ROOT / "configs" / "model" / f"{name}.json", **overrides)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


def generate(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)


def check(name: str) -> None:
    """Raise unless all ways to the next token give the same one in fp32."""
    layers = {"num_mamba_layers": 6} if "taipan" in name else {"num_hidden_layers": 3}
    model = build(name, torch.float32, vocab_size=1000, **layers)
    # No length in between is divisible by 16, for which kernels would be compiled again.
    ids, new = torch.randint(3, 1000, (2, 305), device="cuda"), 12
    captured = [generate(model, ids, new) for _ in range(2)][-1]
    for way, options in {
        "steps one by one": {"disable_compile": True},
        "whole passes": {"use_cache": False},
        "transformers' loop": THEIR_LOOP,
    }.items():
        if not torch.equal(captured, generate(model, ids, new, **options)):
            raise SystemExit(f"{name}: captured steps and {way} give different tokens")
    print(f"{name.rpartition('-')[0]}: tokens agree", flush=True)


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of a call that ends with the GPU idle; fewer repeats of what takes long."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def replay_ms(model: PreTrainedModel) -> float | None:
    """The step captured last, back to back; None where the capture was too large to be kept."""
    captures = list(graphs_of(model).captures.values())
    if not captures:
        return None
    steps = [g for key, g in captures[-1].graphs.items() if key[0] != "prompt" and g is not None]
    return wall_ms(steps[-1].replay)


def of_calls(call: Callable[[int], object], new: int, repeats: int = 3) -> dict[str, float]:
    """Times of whole calls: a token's share of a long one, and what a token adds."""
    short = max(new // 5, 2)
    # The host makes the short calls, where it is what takes the time, uneven: more of them.
    each = ((1, 3 * repeats), (short, repeats), (new, repeats))
    first, few, many = (1e3 * seconds(lambda n=n: call(n), times) for n, times in each)
    return {
        "ms_per_token": many / new,
        "added_ms_per_token": (many - few) / (new - short),
        "first_token_ms": first,
    }


def ours(
    model: PreTrainedModel, batch: int, prompt: int, new: int, state: torch.dtype | None
) -> dict[str, float]:
    ids = torch.randint(3, 50000, (batch, prompt), device="cuda")

    def call(tokens: int, **options: Any) -> None:
        if state is not None:
            options["past_key_values"] = RecurrentCache(model.config, state_dtype=state)
        generate(model, ids, tokens, **options)

    forget_graphs(model)
    values: dict[str, float | None] = {"first_call_s": seconds(lambda: call(4), 1)}
    values["second_call_s"] = seconds(lambda: call(4), 1)
    values |= of_calls(call, new)
    values["replay_ms"] = replay_ms(model)
    if state is None and (values["ms_per_token"] or 0) * new < 1e3:
        call(4, **SAMPLED)
        call(4, **SAMPLED)
        many = 1e3 * seconds(lambda: call(new, **SAMPLED), 1)
        values["sampled_ms_per_token"] = many / new
        values["sampled_replay_ms"] = replay_ms(model)
    if state is None and model.num_parameters() < 1e9:
        call(4, **THEIR_LOOP)
        their = of_calls(lambda tokens: call(tokens, **THEIR_LOOP), new)
        values["transformers_loop_ms_per_token"] = their["added_ms_per_token"]
    return {name: value for name, value in values.items() if value is not None}


def prefill(model: PreTrainedModel, batch: int, prompt: int) -> dict[str, float]:
    """`ms`: `generate` of one token; `forward_ms`: the model called as a function."""
    ids = torch.randint(3, 50000, (batch, prompt), device="cuda")
    one = lambda: generate(model, ids, 1)  # noqa: E731
    one(), one()
    with torch.no_grad():
        run = lambda: model(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
        run()
        return {"ms": 1e3 * seconds(one, 7), "forward_ms": 1e3 * seconds(run, 7)}


def after(model: PreTrainedModel, context: int, new: int) -> dict[str, float]:
    """A prompt of `context` tokens in chunks, then calls of `generate` that go on from there."""
    ids = torch.randint(3, 50000, (1, context), device="cuda")
    cache = RecurrentCache(model.config)

    def read() -> None:
        with torch.no_grad():
            for part in ids.split(8192, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)

    def go_on(tokens: int) -> float:
        # What the cache has read is not read again; the last token is what it has not.
        seen = torch.randint(3, 50000, (1, cache.get_seq_length() + 1), device="cuda")
        return seconds(lambda: generate(model, seen, tokens, past_key_values=cache), 1)

    values = {"prefill_s": seconds(read, 1)}
    few = max(new // 5, 2)
    go_on(few), go_on(few)
    torch.cuda.reset_peak_memory_stats()
    short, long = go_on(few), go_on(new)
    values["step_ms"] = 1e3 * (long - short) / (new - few)
    values["cache_mib"] = cache.nbytes / 2**20
    values["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return values


def peer(name: str, batch: int, prompt: int, new: int) -> dict[str, float]:
    """mamba_ssm's generate with its own CUDA graph."""
    without_cuda_scan()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = json.loads((ROOT / "configs" / "model" / f"{name}.json").read_text())
    layer = "Mamba2" if config["model_type"] == "mamba2" else "Mamba1"
    with torch.device("cuda"):
        model = MambaLMHeadModel(
            MambaConfig(
                d_model=config["hidden_size"],
                n_layer=config["num_hidden_layers"],
                vocab_size=config["vocab_size"],
                ssm_cfg={"layer": layer},
            ),
            device="cuda",
            dtype=torch.bfloat16,
        ).eval()
    ids = torch.randint(3, 50000, (batch, prompt), device="cuda")

    def call(tokens: int) -> None:
        # One cache size for all lengths, or the graph would be captured anew.
        model.generate(ids, max_length=prompt + tokens, cg=True, top_k=1, enable_timing=False)

    call(new)
    return of_calls(call, new, repeats=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=250)
    parser.add_argument("--contexts", default="", help="tokens behind the new ones; one row")
    parser.add_argument("--no-check", action="store_true", help="do not compare tokens first")
    parser.add_argument("--peers", action="store_true", help="time mamba_ssm instead")
    parser.add_argument("--output", default=str(RESULTS / "generation.jsonl"))
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    names = args.models.split(",")
    ssm_hf.register(override=True)
    if args.peers:
        for name in names:
            for batch in batches:
                time_peer(args, name, batch)
        return
    for family in sorted({n.rpartition("-")[0] for n in names}, reverse=True):
        if not args.no_check:
            check(f"{family}-130m")
    for name in names:
        model = build(name)
        if hasattr(model, "calibrate_threshold"):
            model.calibrate_threshold([{"input_ids": torch.randint(3, 50000, (1, 4096)).cuda()}])
        for context in map(int, filter(None, args.contexts.split(","))):
            values = after(model, context, args.new)
            case = f"decode-{name.rpartition('-')[2]}-{context}-{name.rpartition('-')[0]}"
            write(args.output, case, "ssm_hf", values, {"B": 1, "context": context})
            forget_graphs(model)
        if args.contexts:
            continue
        if "130m" in name:
            values = prefill(model, 1, args.prompt)
            case = f"prefill-130m-{name.split('-')[0]}"
            write(args.output, case, "ssm_hf", values, {"B": 1, "prompt": args.prompt})
        for batch in batches:
            for state in (None, torch.bfloat16) if batch > 1 else (None,):
                shape = {"B": batch, "prompt": args.prompt, "new": args.new}
                values = ours(model, batch, args.prompt, args.new, state)
                provider = "ssm_hf" if state is None else "ssm_hf, states in bf16"
                write(args.output, case_of(name, batch), provider, values, shape)
                forget_graphs(model)
                torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()


def time_peer(args: argparse.Namespace, name: str, batch: int) -> None:
    shape = {"B": batch, "prompt": args.prompt, "new": args.new}
    try:
        values, why = peer(name, batch, args.prompt, args.new), {}
    except (ImportError, RuntimeError, NameError, TypeError) as error:
        values, why = {}, {"reason": f"{type(error).__name__}: {error}"[:300]}
    write(args.output, case_of(name, batch), "mamba_ssm", values, shape, **why)
    if values and "130m" in name and batch == 1:
        first = {"ms": values["first_token_ms"]}
        case = f"prefill-130m-{name.split('-')[0]}"
        write(args.output, case, "mamba_ssm", first, {"B": 1, "prompt": args.prompt})
    torch.cuda.empty_cache()


def write(path: str, case: str, provider: str, values: dict[str, float], shape: dict[str, int],
          **details: Any) -> None:  # fmt: skip
    append(path, record("generation", case, provider, values, shape=shape, dtype="bfloat16",
                        **details))  # fmt: skip
    shown = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
    print(f"{case:<28} {provider:<10} {shown} {details.get('reason', '')}", flush=True)


if __name__ == "__main__":
    main()
