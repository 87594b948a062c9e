"""A prompt of a million tokens in chunks, then generated tokens, in constant memory.

    python -m benchmarks.long_prefill [--tokens 1000000] [--chunk 65536] [--new 1000]

First the same model reads a shorter prompt at once and in chunks: the states must agree.
"""

import argparse
import time

import torch

import ssm_hf
from benchmarks.common import RESULTS, append, record
from benchmarks.generation import build
from ssm_hf import RecurrentCache


@torch.no_grad()
def compare(model: torch.nn.Module, ids: torch.Tensor, chunk: int) -> float:
    """Largest relative error of a state after reading ids in chunks, against one pass."""
    at_once, in_chunks = RecurrentCache(model.config), RecurrentCache(model.config)
    model(ids, past_key_values=at_once, logits_to_keep=1)
    for part in ids.split(chunk, dim=1):
        model(part, past_key_values=in_chunks, logits_to_keep=1)
    return max(
        float((a.state[n] - b.state[n]).norm() / a.state[n].norm())
        for a, b in zip(at_once.layers, in_chunks.layers, strict=True)
        for n in a.state
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mamba2-130m")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=65536)
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--output", default=str(RESULTS / "generation.jsonl"))
    args = parser.parse_args()
    ssm_hf.register(override=True)
    exact = build(args.model, torch.float32, num_hidden_layers=3)
    ids = torch.randint(3, 50000, (1, 100_000), device="cuda")
    error = compare(exact, ids, 7_777)
    # fp32 sums over 100 000 tokens, cut in other places
    if error > 1e-4:
        raise SystemExit(f"states after chunks and after one pass differ by {error:.1e}")
    prompt = ids[:, :50_000]
    tokens = [
        exact.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, **options)
        for options in ({}, {"prefill_chunk_size": 7_777})
    ]
    if not torch.equal(*tokens):
        raise SystemExit("tokens after chunks and after one pass differ")
    print(f"one pass = chunks: states within {error:.1e}, 64 tokens equal", flush=True)
    del exact

    model = build(args.model)
    values: dict[str, float] = {"state_error": error}
    lengths = (2 * args.chunk, args.tokens)
    for length in lengths:
        ids = torch.randint(3, 50000, (1, length), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, start = torch.cuda.memory_allocated(), time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new,
            prefill_chunk_size=args.chunk,
        )
        assert out.shape[1] == length + args.new
        torch.cuda.synchronize()
        values[f"seconds_{length}"] = time.perf_counter() - start
        values[f"peak_mib_{length}"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        print("  ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
    # Numbers, mask and positions of a prompt are 8 bytes a token each, and `generate` copies them.
    grown = values[f"peak_mib_{lengths[1]}"] - values[f"peak_mib_{lengths[0]}"]
    if grown * 2**20 > 64 * (lengths[1] - lengths[0]):
        raise SystemExit(f"the longer prompt takes {grown:.0f} MiB more")
    shape = {"tokens": args.tokens, "chunk": args.chunk, "new": args.new}
    append(args.output, record("generation", "long-prefill", "ssm_hf", values, shape=shape,
                               dtype="bfloat16"))  # fmt: skip


if __name__ == "__main__":
    main()
