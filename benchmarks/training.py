"""Training speed and memory: one forward and backward pass, and a whole optimiser step.

    python -m benchmarks.training [--models mamba2-130m ...] [--ways graph ...] [--peers llama ...]

bf16 autocast over fp32 weights, rows of random tokens, the fused loss for ours and the usual one
for the peers. Ours is timed three ways (see `model.execution` in training/config.py), the peers
eagerly, compiled or captured (`--peers llama:compile mamba_ssm:eager`), their autotuners' search
shortened (see `Autotuners` in benchmarks/peers.py). Before anything is timed, loss and gradients of
the kernels are held to those of the torch path in fp32; so are those of mamba_ssm's models, which
are given our weights.

With --first-step a training run is started in a fresh process with an empty kernel cache, and the
time until its first step is done is taken.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ssm_hf
from benchmarks import common
from benchmarks.peers import Autotuners, cuda_extension, without_cuda_scan
from training.graph import GraphedPass
from training.peaks import peak_flops

VOCAB = 50288
MODELS = common.ROOT / "configs" / "model"
Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]


# --- models ---------------------------------------------------------------------------------------


def ours(name: str, layers: int | None = None) -> tuple[nn.Module, Loss]:
    """A model of configs/model, if wanted with fewer layers, and its loss on the ids of a batch."""
    config = AutoConfig.from_pretrained(MODELS / f"{name}.json")
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    options = {"use_cache": False, "return_logits": False}
    return model, lambda batch: model(**batch, labels=batch["input_ids"], **options).loss


def llama(layers: int, hidden: int, heads: int) -> tuple[nn.Module, Loss]:
    """A Llama with flash attention and as many parameters as ours, embeddings tied as ours are."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).train()
    return model, lambda batch: model(**batch, labels=batch["input_ids"], use_cache=False).loss


def mamba_ssm(name: str, layers: int | None = None) -> tuple[nn.Module, Loss]:
    """Their model of the same sizes, with our weights. Mamba-2 runs on their Triton scan; where
    causal-conv1d is not installed, on torch's convolution, which is what their code then takes.

    Raises:
        ImportError: Mamba-1, and their CUDA scan is not installed.
    """
    without_cuda_scan()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules import mamba2

    own, _ = ours(name, layers)
    if own.config.model_type == "mamba2":
        has_conv = mamba2.causal_conv1d_fn is not None
        layer = {"layer": "Mamba2", "use_mem_eff_path": has_conv}
    else:
        cuda_extension("selective_scan_cuda")
        layer = {"layer": "Mamba1"}
    config = MambaConfig(own.config.hidden_size, n_layer=own.config.num_hidden_layers,
                         vocab_size=own.config.vocab_size, ssm_cfg=layer)  # fmt: skip
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.float32).train()
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for our_name, p in own.named_parameters():
            theirs.pop(our_name.replace(".embeddings.", ".embedding.")).copy_(p)
    if theirs:
        raise RuntimeError(f"mamba_ssm's model has parameters that ours has not: {list(theirs)}")
    return model, _loss_of_logits(model)


def fla(name: str, layers: int | None = None) -> tuple[nn.Module, Loss]:
    from fla.models import Mamba2Config, Mamba2ForCausalLM

    own = AutoConfig.from_pretrained(MODELS / f"{name}.json")
    config = Mamba2Config(
        hidden_size=own.hidden_size,
        num_hidden_layers=layers or own.num_hidden_layers,
        num_heads=own.num_heads,
        head_dim=own.head_dim,
        state_size=own.state_size,
        n_groups=own.n_groups,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Mamba2ForCausalLM(config).train()
    return model, lambda batch: model(**batch, labels=batch["input_ids"], use_cache=False).loss


def _loss_of_logits(model: nn.Module) -> Loss:
    def loss(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        logits = model(ids).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return loss


class Peer(NamedTuple):
    """What its results are filed under, how to build it, and our model of the same function."""

    case: str
    provider: str
    build: Callable[..., tuple[nn.Module, Loss]]
    own: str | None = None


def _peer_of(name: str, provider: str, build: Callable[..., tuple[nn.Module, Loss]]) -> Peer:
    family, size = name.split("-")
    own = name if provider == "mamba_ssm" else None
    return Peer(f"train-{size}-{family}", provider, functools.partial(build, name), own)


PEERS: dict[str, Peer] = {
    "llama": Peer("train-130m-llama", "transformers", functools.partial(llama, 12, 768, 12)),
    "llama-370m": Peer("train-370m-llama", "transformers", functools.partial(llama, 24, 1024, 16)),
    "mamba_ssm": _peer_of("mamba2-130m", "mamba_ssm", mamba_ssm),
    "mamba_ssm-370m": _peer_of("mamba2-370m", "mamba_ssm", mamba_ssm),
    "mamba_ssm-1": _peer_of("mamba-130m", "mamba_ssm", mamba_ssm),
    "mamba_ssm-1-370m": _peer_of("mamba-370m", "mamba_ssm", mamba_ssm),
    "fla": _peer_of("mamba2-130m", "fla", fla),
}


# --- one pass -------------------------------------------------------------------------------------


def backward_pass(loss: Loss, keep: bool = False) -> Callable[[Batch, Tensor], Tensor]:
    def run(batch: Batch, share: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16), ssm_hf.keep_activations(keep):
            value = loss(batch)
        (value * share).backward()
        return value.detach()

    return run


def loss_and_gradients(model: nn.Module, loss: Loss, batch: Batch, bf16: bool) -> list[Tensor]:
    """Loss and gradient, the latter in one piece in the host's memory."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bf16):
        value = loss(batch)
    value.backward()
    # The only name of a parameter that differs comes first in ours and theirs, if sorted.
    grads = [p.grad.flatten().float() for _, p in sorted(model.named_parameters())]
    model.zero_grad(set_to_none=True)
    return [value.detach().double().cpu(), torch.cat(grads).cpu()]


class Truth(NamedTuple):
    """Loss and gradient of one of our models on the torch path in fp32, and in bf16."""

    exact: list[Tensor]
    bf16: list[Tensor]

    @classmethod
    def of(cls, name: str, batch: Batch) -> "Truth":
        model, loss = ours(name)
        with ssm_hf.implementation("reference"):
            return cls(*(loss_and_gradients(model, loss, batch, bf16) for bf16 in (False, True)))


def check(
    model: nn.Module, loss: Loss, batch: Batch, truth: Truth, factor: float
) -> dict[str, float]:
    """Errors of the bf16 loss and gradient, and those of our torch path in bf16.

    Raises:
        RuntimeError: the model is more than `factor` times as far off.
    """
    got = {"auto": loss_and_gradients(model, loss, batch, bf16=True), "reference": truth.bf16}
    errors = {
        f"{what}_error_{impl}": float((value - exact).norm() / exact.norm())
        for impl, values in got.items()
        for what, value, exact in zip(("loss", "gradient"), values, truth.exact, strict=True)
    }
    for what in ("loss", "gradient"):
        bound = factor * errors[f"{what}_error_reference"] + 1e-3
        if not errors[f"{what}_error_auto"] <= bound:
            raise RuntimeError(f"{what}: {errors}; nothing is timed")
    return errors


def peak_gib(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def top_kernels(run: Callable[[], object], count: int = 25) -> str:
    """A table of the kernels that take most of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    lines = [f"all kernels: {total / 1e3:.2f} ms, {sum(e.count for e in events)} launches"]
    for e in events[:count]:
        ms, share = e.self_device_time_total / 1e3, e.self_device_time_total / total
        lines.append(f"{ms:8.3f} ms {share:6.1%} {e.count:6d}x  {e.key[:100]}")
    return "\n".join(lines)


def measure(
    model: nn.Module, loss: Loss, way: str, batch: Batch, seconds: float, profile: bool
) -> dict[str, float]:
    """Speed and memory of one way to run the pass, and of the whole step."""
    model.zero_grad(set_to_none=True)
    ids = batch["input_ids"]
    share = torch.ones((), device=ids.device)
    single = backward_pass(loss, keep=way == "graph-keep")
    began = time.perf_counter()
    is_graph = way.startswith("graph")
    if is_graph:
        graphed = GraphedPass(single, model.parameters())
        peak = peak_gib(lambda: graphed(batch, share, is_first=True))

        def run() -> None:
            graphed(batch, share, is_first=True)
    else:
        if way == "compile":
            for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
                block.compile(fullgraph=True, dynamic=False)
        elif way == "compile-whole":
            model.compile(dynamic=False)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            single(batch, share)

        run()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        peak = peak_gib(run)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    print(f"{way}: ready after {warm_up:.1f} s", flush=True)
    wall = common.wall_ms(run, seconds)
    # A replay leaves the host nothing to do.
    device = wall if is_graph else common.profiled_ms(run)
    values = {"wall_ms": wall, "device_ms": device}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        run()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    values["step_wall_ms"] = common.wall_ms(step, seconds)
    if profile:
        print(top_kernels(step), flush=True)
    tokens = ids.numel()
    values |= {
        "tokens_per_s": 1e3 * tokens / wall,
        "step_tokens_per_s": 1e3 * tokens / values["step_wall_ms"],
        "device_tokens_per_s": 1e3 * tokens / values["device_ms"],
        "peak_gib": peak,
        "step_peak_gib": peak_gib(step),
        "warm_up_s": warm_up,
    }
    peak_rate = peak_flops(ids.device, "bf16")
    if hasattr(model, "flops_per_token") and peak_rate is not None:
        work = 3 * model.flops_per_token(ids.shape[1])
        values["mfu"] = work * values["tokens_per_s"] / peak_rate
    return values


# --- first step -----------------------------------------------------------------------------------


def first_step(model: str) -> dict[str, float]:
    """Seconds from the start of a training process to the end of its first step, caches empty."""
    with tempfile.TemporaryDirectory() as folder:
        text, log = Path(folder) / "text.txt", Path(folder) / "run" / "log.jsonl"
        text.write_text("A quick brown fox jumps over the lazy dog. " * 20_000)
        command = [
            *(sys.executable, "-m", "training.train"),
            *("--config", str(common.ROOT / "configs" / "train" / "pretrain-mamba2-130m.yaml")),
            *("--model.config", str(MODELS / f"{model}.json"), "--run_dir", str(log.parent)),
            *("--tokenizer.source", "byte", "--data.dataset", "null", "--data.streaming", "false"),
            *("--data.files", str(text), "--data.heldout_fraction", "0", "--tracker", "null"),
            *("--batch_size", "8", "--micro_batch_size", "8", "--log_every", "1"),
            *("--max_steps", "3", "--schedule.warmup_steps", "1", "--save_every", "0"),
        ]
        caches = {
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }
        start = time.monotonic()
        with open(Path(folder) / "output", "w") as output:
            process = subprocess.Popen(
                command, cwd=common.ROOT, env={**os.environ, **caches}, stdout=output, stderr=output
            )
        first = started = None
        while first is None and process.poll() is None:
            time.sleep(0.02)
            events = []
            if log.is_file():
                with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
            if started is None and "start" in events:
                started = time.monotonic() - start
            if "train" in events:
                first = time.monotonic() - start
                process.terminate()
        process.wait()
        if first is None or started is None:
            raise RuntimeError((Path(folder) / "output").read_text()[-3000:])
    # The figures of a step are written after the next one was launched, some milliseconds late.
    return {"seconds": first, "until_loop_s": started, "step_s": first - started}


# --- peers' autotuners ----------------------------------------------------------------------------

# Peers whose kernels are autotuned.
TUNED = ("mamba_ssm", "fla")


def start_compilers(arguments: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Processes that compile the candidates of the peers' autotuners, a part each."""
    tuned = [name for name in arguments.peers if name.startswith(TUNED)]
    command = [
        *(sys.executable, "-m", "benchmarks.training", "--peers", *tuned),
        *("--batch", str(arguments.batch), "--length", str(arguments.check_length)),
        *("--peer-choices", str(arguments.peer_choices), "--compile-part"),
    ]
    parts = [str(part) for part in range(arguments.processes if tuned else 0)]
    return [
        subprocess.Popen([*command, part, str(arguments.processes)], cwd=common.ROOT)
        for part in parts
    ]


def wait(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.wait()


def compile_part(
    names: list[str], part: int, parts: int, choices: Path, batch: int, length: int
) -> None:
    """Compile every `parts`-th candidate of these peers' training pass.

    Triton compiles anew for sizes that are 1 and for those that 16 divides, so that of a larger
    batch the smallest one of its kind will do, as will one layer and a few of the peers' chunks.
    """
    rows = batch if batch == 1 else 16 if batch % 16 == 0 else 2
    ids = torch.randint(3, 50280, (rows, length), device="cuda")
    built = [PEERS[name.partition(":")[0]].build(layers=1) for name in names]
    Autotuners(choices).compile_only(part, parts)
    for _, loss in built:
        backward_pass(loss)({"input_ids": ids}, torch.ones((), device="cuda"))


# --- main -----------------------------------------------------------------------------------------


def runs(arguments: argparse.Namespace) -> Iterator[tuple[Peer, str]]:
    """What to time, ours among it, and in which way."""
    for name in arguments.models:
        for way in arguments.ways:
            yield _peer_of(name, "ssm_hf", ours)._replace(own=name), way
    for name in arguments.peers:
        name, _, way = name.partition(":")
        yield PEERS[name], way or "eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["mamba2-130m", "mamba-130m"])
    parser.add_argument("--ways", nargs="*", default=["graph", "eager"],
                        choices=["graph", "graph-keep", "eager", "compile",
                                 "compile-whole"])  # fmt: skip
    parser.add_argument("--peers", nargs="*", default=[], metavar="PEER[:WAY]",
                        help=f"of {', '.join(PEERS)}, eagerly or as WAY says")  # fmt: skip
    parser.add_argument("--processes", type=int, default=8, help="compile for peers' autotuners")
    parser.add_argument("--peer-choices", type=Path, default=common.RESULTS / "peer_choices.json")
    parser.add_argument("--compile-part", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=1,
                        help="packed in each row, on average; not with peers")  # fmt: skip
    parser.add_argument("--check-length", type=int, default=512,
                        help="of each row, for holding loss and gradients to fp32")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each timing")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--first-step", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "training.jsonl")
    arguments = parser.parse_args()
    if arguments.documents > 1 and arguments.peers:
        parser.error("--documents: peers would mix what is packed")
    ssm_hf.register(override=True)
    if arguments.compile_part is not None:
        part, parts = arguments.compile_part
        shape = arguments.batch, arguments.length
        compile_part(arguments.peers, part, parts, arguments.peer_choices, *shape)
        return
    compilers = start_compilers(arguments)

    def keep(case: str, provider: str, values: dict[str, float], **details: Any) -> None:
        result = common.record("training", case, provider, values, **details)
        common.append(arguments.output, result)
        print(json.dumps(result), flush=True)

    shape = {"B": arguments.batch, "T": arguments.length}
    ids = torch.randint(3, 50280, (arguments.batch, arguments.length), device="cuda")
    share = torch.ones((), device="cuda")
    batch = {"input_ids": ids}
    if arguments.documents > 1:
        starts = torch.rand(ids.shape, device="cuda") * ids.shape[1] < arguments.documents - 1
        batch["seq_idx"] = starts.cumsum(1)
        shape["documents"] = arguments.documents
    some = {name: value[:, : arguments.check_length] for name, value in batch.items()}
    names = dict.fromkeys(peer.own for peer, _ in runs(arguments) if peer.own is not None)
    truths = {name: Truth.of(name, some) for name in names}
    for (case, provider, build, own), way in runs(arguments):
        if arguments.documents > 1:
            case = case.replace("train-", "train-packed-")
        model, loss = build()
        kept = way == "graph-keep"
        if provider in TUNED:
            wait(compilers)
            Autotuners(arguments.peer_choices).measure_briefly()
        elif provider == "ssm_hf":
            with ssm_hf.compile_ahead():
                backward_pass(loss, kept)(some, share)
        details = {
            "way": way,
            "shape": shape,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if own is not None:
            # As many rows as are timed: these are the same kernels. A peer may round where we do
            # not; another function would be off by the gradient's own size.
            factor = 2 if provider == "ssm_hf" else 4
            with ssm_hf.keep_activations(kept):
                details |= check(model, loss, some, truths[own], factor)
        wait(compilers)  # they use the GPU too
        values = measure(model, loss, way, batch, arguments.seconds, arguments.profile)
        keep(case, provider, values, **details)
        del model, loss
        torch.cuda.empty_cache()
    for model in arguments.first_step:
        keep(f"first-step-{model.split('-')[1]}", "ssm_hf", first_step(model), model=model)


if __name__ == "__main__":
    main()
