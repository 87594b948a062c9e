"""Times generation: the replayed step, whole calls, prefill, and the same with mamba_ssm.

    python -m benchmarks.generation [--models mamba2-130m,...] [--batches 1,64] [--peers]

Weights are random, in bf16, with the shapes of configs/model/*.json. Before a time is printed the
tokens of a small model of the same family are compared in fp32: captured steps, steps one by one,
and whole forward passes without a cache must agree.

Measures: `replay_ms` is the captured step alone, back to back; `ms_per_token` is what a token adds
to a `generate` call, host included; `call_ms` the call of `new_tokens` tokens with its prefill.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ssm_hf.generation.graphs import forget_graphs, graphs_of

MODELS = ("mamba2-130m", "mamba-130m", "mamba2-2.7b", "mamba-2.8b")
SAMPLED = {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8}


class Unknown(LogitsProcessor):
    """Changes nothing, but sends a request to transformers' loop."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def case_of(name: str, batch: int) -> str:
    """`mamba-2.8b`, 64 -> `generate-2.7b-b64-mamba`, as benchmarks/targets.json names it."""
    family, size = name.split("-")
    return f"generate-{size.replace('2.8b', '2.7b')}-b{batch}-{family}"


def build(name: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(ROOT / "configs" / "model" / f"{name}.json", **overrides)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


@contextmanager
def uncaptured(model: PreTrainedModel) -> Iterator[None]:
    """Steps run one by one: a hook keeps them from being captured."""
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def generate(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)


def check(name: str) -> None:
    """Raise unless all ways to the next token give the same one in fp32."""
    model = build(name, torch.float32, num_hidden_layers=4)
    ids = torch.randint(3, 1000, (2, 50), device="cuda")
    captured = generate(model, ids, 100)
    with uncaptured(model):
        stepped = generate(model, ids, 100)
    whole = generate(model, ids, 100, use_cache=False)
    theirs = generate(model, ids, 100, logits_processor=LogitsProcessorList([Unknown()]))
    for way, tokens in {"stepped": stepped, "whole": whole, "transformers' loop": theirs}.items():
        if not torch.equal(captured, tokens):
            raise SystemExit(f"{name}: captured steps and {way} give different tokens")


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of a call that ends with the GPU idle."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def per_token_ms(call: Callable[[int], object], short: int, long: int) -> float:
    """What a token adds to a call."""
    call(short)
    return 1e3 * (seconds(lambda: call(long)) - seconds(lambda: call(short))) / (long - short)


def replay_ms(model: PreTrainedModel) -> float:
    """The last captured step, back to back."""
    captures = list(graphs_of(model).captures.values())
    graph = next(g for g in reversed(captures[-1].graphs.values()) if g is not None)
    return wall_ms(graph.replay)


def ours(model: PreTrainedModel, batch: int, prompt: int, new: int) -> dict[str, float]:
    ids = torch.randint(3, 50000, (batch, prompt), device="cuda")
    forget_graphs(model)
    first = seconds(lambda: generate(model, ids, 4), repeats=1)
    values = {"first_call_s": first}
    short, long = max(new // 5, 4), new
    greedy = lambda n: generate(model, ids, n)  # noqa: E731
    values["ms_per_token"] = per_token_ms(greedy, short, long)
    values["replay_ms"] = replay_ms(model)
    values["call_ms"] = 1e3 * seconds(lambda: greedy(long))
    values["sampled_ms_per_token"] = per_token_ms(
        lambda n: generate(model, ids, n, **SAMPLED), short, long
    )
    values["sampled_replay_ms"] = replay_ms(model)
    loop = LogitsProcessorList([Unknown()])
    values["transformers_loop_ms_per_token"] = per_token_ms(
        lambda n: generate(model, ids, n, logits_processor=loop), short, long
    )
    values["transformers_loop_sampled_ms_per_token"] = per_token_ms(
        lambda n: generate(model, ids, n, logits_processor=loop, **SAMPLED), short, long
    )
    return values


def prefill(model: PreTrainedModel, batch: int, prompt: int) -> dict[str, float]:
    ids = torch.randint(3, 50000, (batch, prompt), device="cuda")
    with torch.no_grad():
        run = lambda: model(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
        run()
        return {"ms": 1e3 * seconds(run, 7)}


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
    return {"ms_per_token": per_token_ms(call, max(new // 5, 4), new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=250)
    parser.add_argument("--peers", action="store_true", help="time mamba_ssm too")
    parser.add_argument("--output", default=str(RESULTS / "generation.jsonl"))
    args = parser.parse_args()
    ssm_hf.register(override=True)
    for family in sorted({n.split("-")[0] for n in args.models.split(",")}, reverse=True):
        check(f"{family}-130m")
        print(f"{family}: tokens agree", flush=True)
    for name in args.models.split(","):
        model = build(name)
        family = name.split("-")[0]
        if "130m" in name:
            values = prefill(model, 1, args.prompt)
            write(args.output, f"prefill-130m-{family}", "ssm_hf", values, {"B": 1})
        for batch in map(int, args.batches.split(",")):
            shape = {"B": batch, "prompt": args.prompt, "new": args.new}
            values = ours(model, batch, args.prompt, args.new)
            write(args.output, case_of(name, batch), "ssm_hf", values, shape)
        del model
        torch.cuda.empty_cache()
        for batch in map(int, args.batches.split(",") if args.peers else []):
            shape = {"B": batch, "prompt": args.prompt, "new": args.new}
            try:
                values, why = peer(name, batch, args.prompt, args.new), {}
            except (ImportError, RuntimeError, NameError, TypeError) as error:
                values, why = {}, {"reason": f"{type(error).__name__}: {error}"[:300]}
            write(args.output, case_of(name, batch), "mamba_ssm", values, shape, **why)
            torch.cuda.empty_cache()


def write(path: str, case: str, provider: str, values: dict[str, float], shape: dict[str, int],
          **details: Any) -> None:  # fmt: skip
    append(path, record("generation", case, provider, values, shape=shape, dtype="bfloat16",
                        **details))  # fmt: skip
    shown = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
    print(f"{case:<28} {provider:<10} {shown} {details.get('reason', '')}", flush=True)


if __name__ == "__main__":
    main()
