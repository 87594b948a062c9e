"""Train or finetune a causal language model.

accelerate launch -m training.train --config configs/train/<run>.yaml [--key value ...]

Reads top to bottom: config, accelerator, data, model, optimiser, loop, save. Keys are explained in
training/config.py. Everything a run writes lies in its `run_dir`: config.yaml, heldout.jsonl,
log.jsonl, tracking/, checkpoints/, final/ and, if asked for, seen_tokens.bin.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    ProjectConfiguration,
    TorchDynamoPlugin,
    broadcast,
    set_seed,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import ssm_hf
from training.checkpoint import (
    TrainerState,
    check_same_data,
    find_checkpoint,
    keep_weights_out_of_state,
    load_trainer_state,
    remove_leftovers,
    save_checkpoint,
    save_model,
    whole_directory,
)
from training.config import OptimizerConfig, TrainConfig, flatten, load_config
from training.data import (
    TrainingData,
    load_tokenizer,
    prepare_data,
    write_heldout,
    write_seen_tokens,
)
from training.graph import Batch, GraphedPass, Pass
from training.metrics import Meter, RunLog, heldout_loss, model_figures, write_samples
from training.packing import IGNORED, PackedRows
from training.peers import flops_per_token, loss_options, parameter_groups, smoothing_loss
from training.schedule import lr_factor, run_progress
from training.tasks import TaskRows


def main(argv: Sequence[str] | None = None) -> None:
    ssm_hf.register(override=True)
    config = load_config(argv)
    run_dir = Path(config.run_dir)

    accelerator = build_accelerator(config)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(run_dir, config.resume)
    state = TrainerState() if checkpoint is None else load_trainer_state(checkpoint)
    set_seed(config.seed)

    tokenizer = None
    if config.data.task.name is None or config.tokenizer.source is not None:
        tokenizer = load_tokenizer(config.tokenizer, config.model.checkpoint)
    total_rows = config.max_steps * config.batch_size
    data = prepare_data(config.data, tokenizer, config.seed, total_rows)
    identity = data.identity(config.seed)
    if checkpoint is not None:
        check_same_data(state, identity, checkpoint)
    state.data = identity

    model = build_model(config, checkpoint, tokenizer, data)
    optimizer = build_optimizer(model, config.optimizer, accelerator.device)
    meter = Meter(config, flops_per_token(model, config.data.seq_len), accelerator)
    loader, eval_loader = data.loaders(config.seed, config.micro_batch_size, state.samples)
    execution = how_to_run(config, accelerator)
    if execution == "graph":
        # Replays meet no hooks: without those of DistributedDataParallel.
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer, loader, eval_loader = accelerator.prepare(optimizer, loader, eval_loader)
    else:
        model, optimizer, loader, eval_loader = accelerator.prepare(
            model, optimizer, loader, eval_loader
        )
    keep_weights_out_of_state(accelerator)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint / "state"))

    if accelerator.is_main_process:
        config.save(run_dir / "config.yaml")
        write_heldout(run_dir / "heldout.jsonl", data.heldout)
    accelerator.init_trackers("ssm_hf", config=flatten(asdict(config)))
    log = RunLog(run_dir / "log.jsonl", accelerator, resumes=checkpoint is not None)
    log.write("start" if checkpoint is None else "resume", state.step, data=identity)
    figures: list[str] = []
    run_pass = forward_backward(accelerator, model, figures, config)
    graphed = GraphedPass(run_pass, model.parameters()) if execution == "graph" else None
    log.say(
        f"{config.run_dir}: {type(accelerator.unwrap_model(model)).__name__} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{data.summary()}, step {state.step} of at most {config.max_steps}"
    )

    run = Run(
        config=config,
        run_dir=run_dir,
        accelerator=accelerator,
        model=model,
        forward_backward=run_pass,
        graphed=graphed,
        figures=figures,
        optimizer=optimizer,
        tokenizer=tokenizer,
        data=data,
        eval_loader=eval_loader,
        log=log,
    )
    train(run, iter(loader), state, meter)

    finish(run, state)
    accelerator.end_training()


def is_whole(accelerator: Accelerator) -> bool:
    """Whether every process holds all parameters."""
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    return accelerator.distributed_type in kinds


class Run(NamedTuple):
    """What the loop and the end of a run work with."""

    config: TrainConfig
    run_dir: Path
    accelerator: Accelerator
    model: nn.Module
    forward_backward: Pass
    graphed: GraphedPass | None  # takes the place of forward_backward
    figures: list[str]  # names of what a pass returns, known once one has run
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase | None  # None: a task whose ids are its own
    data: TrainingData
    eval_loader: DataLoader | None
    log: RunLog


# --- accelerator, model, optimiser ----------------------------------------------------------------


def build_accelerator(config: TrainConfig) -> Accelerator:
    bf16 = config.precision == "bf16"
    if bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise ValueError(
            f"precision is 'bf16', which {torch.cuda.get_device_name()} does not compute natively; "
            "use 'fp32'"
        )
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        log_with=config.tracker,
        project_config=ProjectConfiguration(
            project_dir=config.run_dir, logging_dir=str(Path(config.run_dir) / "tracking")
        ),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
        if config.model.execution == "compile"
        else None,
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
    )
    per_forward = config.micro_batch_size * accelerator.num_processes
    if config.batch_size % per_forward:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of micro_batch_size "
            f"({config.micro_batch_size}) times processes ({accelerator.num_processes})"
        )
    accelerator.gradient_accumulation_steps = config.batch_size // per_forward
    return accelerator


def how_to_run(config: TrainConfig, accelerator: Accelerator) -> str:
    """`model.execution`, with "auto" decided."""
    execution = config.model.execution
    can_graph = accelerator.device.type == "cuda" and is_whole(accelerator)
    if execution == "graph" and not can_graph:
        raise ValueError(
            'model.execution is "graph", which needs CUDA devices that each hold the whole model, '
            f"got {accelerator.device.type} and {accelerator.distributed_type.value}"
        )
    if execution == "auto":
        return "graph" if can_graph else "eager"
    return execution


def build_model(
    config: TrainConfig,
    checkpoint: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
) -> PreTrainedModel:
    """From the checkpoint to resume, else the one to finetune, else the config; in fp32, which is
    what the optimiser updates (bf16 is autocast's)."""
    source = checkpoint or config.model.checkpoint
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        path = Path(str(config.model.config))
        if not path.is_file():
            raise FileNotFoundError(f"model.config {path}: no such file, expected a config.json")
        model_config = AutoConfig.from_pretrained(path)
        # A new model speaks the tokenizer's language, whatever ids its config was drawn up for.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model_config, name, getattr(tokenizer, name, None))
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    source, tokens = "tokenizer", 0 if tokenizer is None else len(tokenizer)
    if isinstance(data.train, TaskRows):
        source, tokens = f"task {config.data.task.name}", data.train.vocab_size(tokenizer)
    if tokens > model.config.vocab_size:
        raise ValueError(
            f"the {source} has {tokens} tokens, but the model's vocab_size is "
            f"{model.config.vocab_size}"
        )
    if config.model.gradient_checkpointing:
        # Nothing is drawn at random in a block, and a graph could not save the generator's state.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        # renamed between the transformers releases we support
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
            options
        )
    return model.train()


def build_optimizer(
    model: PreTrainedModel, config: OptimizerConfig, device: torch.device
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


# --- loop -----------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """A step that the device may still be working on. result: gradient norm, loss and other
    figures, on the host once `ready` has passed."""

    step: int
    lr: float
    tokens: int
    result: Tensor
    ready: torch.cuda.Event | None


def train(run: Run, batches: Iterator[Batch], state: TrainerState, meter: Meter) -> None:
    """Take steps until max_steps or max_minutes; log, evaluate and save on the way.

    A GPU is given the next step before the last one's figures are read, so it never waits for the
    host. Steps that are not finite change nothing (`step_if_finite`), so nothing is lost by
    learning of them one step late.
    """
    config = run.config
    began = time.monotonic() - state.elapsed_seconds
    is_quiet = not run.accelerator.is_main_process
    bar = tqdm(total=config.max_steps, initial=state.step, unit="step", disable=is_quiet)
    skipped_in_a_row = 0
    behind: Launched | None = None
    mark = time.monotonic()

    def settle() -> None:
        """Wait for the step that was launched last, and write down how it went."""
        nonlocal behind, mark, skipped_in_a_row
        if behind is None:
            return
        step, lr, tokens, result, ready = behind
        behind = None
        if ready is not None:
            ready.synchronize()
        grad_norm, *values = result.tolist()
        figures = dict(zip(run.figures, values, strict=True))
        loss = figures["loss"]
        applied = math.isfinite(loss) and math.isfinite(grad_norm)
        meter.add(time.monotonic() - mark, figures if applied else None)
        mark = time.monotonic()
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{meter.tokens_per_s:,.0f}", refresh=False)
        if applied:
            skipped_in_a_row = 0
        else:
            skipped_in_a_row += 1
            state.skipped += 1
            # As text: JSON has no NaN.
            run.log.write("skip", step, loss=str(loss), grad_norm=str(grad_norm))
        if skipped_in_a_row == config.max_skipped_steps:
            raise RuntimeError(
                f"step {step}: {skipped_in_a_row} steps in a row had a loss or gradient that "
                f"is not finite (now loss {loss}, gradient norm {grad_norm}); "
                "lower optimizer.lr, or look at the data of these steps"
            )
        if step % config.log_every == 0 and applied:
            where = {"tokens": tokens, "elapsed_s": time.monotonic() - began}
            rates = {"lr": lr, "grad_norm": grad_norm, "skipped": state.skipped}
            run.log.write("train", step, **meter.drain(), **rates, **where)

    while (progress := shared_progress(run, state)) < 1:
        factor = lr_factor(config.schedule, state.step, config.max_steps, progress)
        lr = config.optimizer.lr * factor
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        count = run.accelerator.gradient_accumulation_steps
        micro_batches = [next(batches) for _ in range(count)]
        tell_progress(run, state, progress)
        result = train_step(run, micro_batches)
        state.step += 1
        state.samples += config.batch_size
        state.tokens += config.batch_size * config.data.seq_len
        launched = Launched(state.step, lr, state.tokens, *to_host(result))
        settle()
        behind = launched
        # A CPU has done the step by now; and who looks at the model waits for it anyway.
        is_last = state.step == config.max_steps  # finish() evaluates
        evaluates = config.eval_every and state.step % config.eval_every == 0 and not is_last
        saves = config.save_every and state.step % config.save_every == 0
        if launched.ready is None or evaluates or saves:
            settle()
        state.elapsed_seconds = time.monotonic() - began
        if evaluates:
            evaluate(run, state)
        if saves:
            save(run, state)
        if evaluates or saves:
            mark = time.monotonic()
        state.elapsed_seconds = time.monotonic() - began
    settle()
    bar.close()


def to_host(result: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it holds the values (None: it does)."""
    if result.device.type != "cuda":
        return result, None
    copy = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    copy.copy_(result, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return copy, ready


def shared_progress(run: Run, state: TrainerState) -> float:
    """Share of the run that is done, by the main process's clock: all must agree on it."""
    config = run.config
    progress = run_progress(
        state.step, config.max_steps, state.elapsed_seconds / 60, config.max_minutes
    )
    if config.max_minutes is None or run.accelerator.num_processes == 1:
        return progress
    clock = torch.tensor([progress], dtype=torch.float32, device=run.accelerator.device)
    return float(broadcast(clock))


def tell_progress(run: Run, state: TrainerState, progress: float) -> None:
    """Some models have schedules of their own, which go by the share of the run that is done, and
    draw at random: by the step, so that a resumed run draws what one without interruption does."""
    accelerator = run.accelerator
    model = accelerator.unwrap_model(run.model, keep_torch_compile=False)
    tell = getattr(model, "set_training_progress", None)
    if tell is None:
        return
    # Where the model now launches something else, what was captured is no longer its pass.
    if tell(progress) and run.graphed is not None:
        run.graphed.forget()
    step = run.config.seed * 1_000_003 + state.step
    torch.manual_seed(step * accelerator.num_processes + accelerator.process_index)


def train_step(run: Run, micro_batches: list[Batch]) -> Tensor:
    """One optimiser step over the whole batch, launched but not waited for.

    Returns:
        (1 + n,) fp32: gradient norm before clipping, and of the whole batch the mean loss per
        target, and of other figures the means over micro-batches by their targets.
    """
    accelerator = run.accelerator
    counts = torch.stack([(batch["labels"] != IGNORED).sum() for batch in micro_batches])
    # Each micro-batch's mean loss weighs as much as it has targets, so the step is the same however
    # the batch is cut.
    shares = counts / accelerator.reduce(counts.sum(), "sum")
    passes: list[Tensor] = []
    for i, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
        with accelerator.accumulate(run.model):
            if run.graphed is None:
                passes.append(run.forward_backward(batch, share))
            else:
                passes.append(run.graphed(batch, share, is_first=i == 0))
    if run.graphed is not None and accelerator.num_processes > 1:
        run.graphed.average_gradients()
    norm = accelerator.clip_grad_norm_(run.model.parameters(), run.config.optimizer.grad_clip)
    # Sharded gradients have a sharded norm, and DeepSpeed's is a number.
    norm = getattr(norm, "full_tensor", lambda: norm)()
    figures: Any = accelerator.reduce(torch.stack(passes).sum(0), "sum")
    norm = torch.as_tensor(norm).to(figures)
    step_if_finite(run, torch.isfinite(norm + figures[0]))
    result = torch.cat([norm.view(1), figures])
    if run.graphed is None:
        run.optimizer.zero_grad()
    return result


def forward_backward(
    accelerator: Accelerator, model: nn.Module, figures: list[str], config: TrainConfig
) -> Pass:
    """The pass over one micro-batch: adds its share of the step's gradient, returns that of the
    loss and of other figures, whose names it writes into `figures`. The factor undoes the averages
    over micro-batches and processes."""
    undo_mean = accelerator.gradient_accumulation_steps * accelerator.num_processes
    options = loss_options(accelerator.unwrap_model(model, keep_torch_compile=False))
    smoothing = config.label_smoothing
    if smoothing:
        options.pop("return_logits", None)

    def run(batch: Batch, share: Tensor) -> Tensor:
        # Around both: gradient checkpointing runs a part of the forward pass once more.
        with ssm_hf.keep_activations(config.model.keep_activations):
            output = model(**batch, **options)
            loss = output.loss
            if smoothing:
                loss = loss + smoothing * smoothing_loss(output.logits, batch["labels"])
            accelerator.backward(loss * (share * undo_mean))
        values = {"loss": loss, **model_figures(output)}
        figures[:] = values
        return torch.stack([value.detach().float() for value in values.values()]) * share

    return run


def step_if_finite(run: Run, finite: Tensor) -> None:
    """Update the parameters where `finite` () is True, else leave them and the moments alone."""
    optimizer: Any = run.optimizer
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    if is_fused and is_whole(run.accelerator):
        # What gradient scaling uses to drop a step: the fused update reads it on the device, so the
        # host need not wait for the backward pass.
        optimizer.optimizer.found_inf = 1 - finite.float()
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def evaluate(run: Run, state: TrainerState) -> float | None:
    """Log held-out loss and samples; return the held-out bits per byte."""
    bits_per_byte = None
    if run.eval_loader is not None and run.data.evaluation is not None:
        n_bytes = run.data.evaluation.n_bytes
        model = run.model
        if run.config.model.execution == "compile" and is_whole(run.accelerator):
            # Compiling without gradients, and for the last rows, takes longer than it saves.
            model = run.accelerator.unwrap_model(model, keep_torch_compile=False)
        values = heldout_loss(model, run.eval_loader, n_bytes, run.accelerator)
        bits_per_byte = values["heldout_bits_per_byte"]
        run.log.write("eval", state.step, tokens=state.tokens, **values)
        run.log.say(f"step {state.step}: held-out {bits_per_byte:.4f} bits per byte")
    sample = run.config.sample
    if not sample.prompts:
        return bits_per_byte
    assert run.tokenizer is not None  # prompts without one were refused with the config
    texts = write_samples(run.model, run.tokenizer, sample, run.config.seed, run.accelerator)
    for prompt, text in zip(sample.prompts, texts, strict=True):
        run.log.write("sample", state.step, prompt=prompt, text=text)
        run.log.say(f"step {state.step}: sample {(prompt + text)!r}")
    return bits_per_byte


# --- save -----------------------------------------------------------------------------------------


def save(run: Run, state: TrainerState) -> None:
    save_checkpoint(
        run.run_dir, run.accelerator, run.model, run.tokenizer, state, run.config.keep_last
    )


def finish(run: Run, state: TrainerState) -> None:
    """Evaluate, save the last checkpoint and `final/`, and say how it went."""
    bits_per_byte = evaluate(run, state)
    if run.config.save_every and state.step % run.config.save_every:
        save(run, state)
    with whole_directory(run.run_dir / "final", run.accelerator) as temporary:
        save_model(run.accelerator, run.model, run.tokenizer, temporary)
    if run.config.save_seen_tokens and run.accelerator.is_main_process:
        assert isinstance(run.data.train, PackedRows)  # a stream was refused with the config
        path = run.run_dir / "seen_tokens.bin"
        write_seen_tokens(path, run.data.train, run.config.seed, state.samples)
    run.log.write(
        "end",
        state.step,
        tokens=state.tokens,
        elapsed_s=state.elapsed_seconds,
        skipped=state.skipped,
        heldout_bits_per_byte=bits_per_byte,
    )
    held = "" if bits_per_byte is None else f", held-out {bits_per_byte:.4f} bits per byte"
    run.log.say(
        f"done: {state.step} steps, {state.tokens:,} tokens, "
        f"{state.elapsed_seconds / 60:.1f} minutes{held}; model in {run.run_dir / 'final'}"
    )


if __name__ == "__main__":
    main()
