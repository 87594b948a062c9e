"""Speed and memory of a model at every length: prefill, first token, decoding.

Each number is the median of several runs after some for warming up, with the device synchronised
before and after. Decoding at a length starts from one prompt's cache, copied for every sequence of
the batch, so a long context costs one prefill and not a hundred.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.limits import (
    Clock,
    NotPossible,
    arguments,
    attempt,
    check_positions,
    synchronise,
)
from eval.model import LoadedModel, cache_bytes
from eval.options import EfficiencyOptions
from eval.parallel import processes
from eval.samples import SampleStore


def run_efficiency(
    loaded: LoadedModel, options: EfficiencyOptions, seed: int, store: SampleStore
) -> dict[str, Any]:
    """Measure a model.

    Args:
        loaded: the model.
        options: see `EfficiencyOptions`.
        seed: of the random tokens of the prompts.
        store: of the lengths that are done; its settings name the device.

    Returns:
        JSON values: the options and `lengths`, one {"length", "prefill", "first_token", "decode"}
        each. `prefill` has tokens_per_s, peak_bytes (with the weights; null where the device does
        not say) and cache_bytes of one sequence, `first_token` has seconds, `decode` one
        {"tokens_per_s"} per batch size. All have `range` (lowest and highest of the timed runs) and
        `n`; a value that could not be measured is null and has a `reason`.
    """
    measurements = []
    failed: dict[str, str] = {}  # what was not possible at a shorter length
    lengths = sorted(options.lengths)
    for length in tqdm(lengths, desc="efficiency", unit="length", disable=_quiet()):
        measured = store.done.get(str(length))
        if measured is None:
            measured = _Length(loaded, options, seed, length, failed).measure()
            if not _quiet():
                store.add(str(length), measured)
        else:
            failed |= _reasons(measured)
        measurements.append(measured)
    return {
        "repeats": options.repeats,
        "warmup": options.warmup,
        "new_tokens": options.new_tokens,
        "chunk": options.chunk,
        "batch_sizes": options.batch_sizes,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "lengths": measurements,
    }


def _quiet() -> bool:
    return not processes().is_main_process


def _reasons(measured: dict[str, Any]) -> dict[str, str]:
    """Return what was not possible at a length, under the names of `_Length.measure`."""
    values = {"prefill": measured["prefill"], "first_token": measured["first_token"]}
    values |= {f"decode {batch}": value for batch, value in measured["decode"].items()}
    return {name: value["reason"] for name, value in values.items() if "reason" in value}


class _Length:
    """The measurements at one length."""

    def __init__(
        self,
        loaded: LoadedModel,
        options: EfficiencyOptions,
        seed: int,
        length: int,
        failed: dict[str, str],
    ) -> None:
        self.model: PreTrainedModel = loaded.model
        self.options = options
        self.length = length
        self.failed = failed
        device = self.model.device
        generator = torch.Generator().manual_seed(seed)
        vocabulary = min(len(loaded.tokenizer), self.model.config.vocab_size)
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        self.prompt = ids.to(device)
        self.pad = loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in arguments(self.model) else {}

    def measure(self) -> dict[str, Any]:
        prefill = self._try("prefill", self._prefill)
        first = self._try("first_token", self._first_token)
        decode = {
            str(batch): self._try(f"decode {batch}", lambda batch=batch: self._decode(batch))
            for batch in self.options.batch_sizes
        }
        return {"length": self.length, "prefill": prefill, "first_token": first, "decode": decode}

    def _try(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            if name in self.failed:
                raise NotPossible(self.failed[name])
            check_positions(self.model, self.length + self.options.new_tokens)
            return attempt(work)
        except NotPossible as reason:
            self.failed.setdefault(name, f"{reason} at {self.length:,} tokens")
            return {"reason": self.failed[name]}

    def _times(self, work: Callable[[Any], object], prepare: Callable[[], Any]) -> list[float]:
        """Time `work(prepare())` without `prepare`."""
        device = self.model.device
        clock: Clock | None = None
        seconds = []
        for i in range(self.options.warmup + self.options.repeats):
            prepared = prepare()
            synchronise(device)
            start = time.perf_counter()
            work(prepared)
            synchronise(device)
            if i >= self.options.warmup:
                seconds.append(time.perf_counter() - start)
            # The first run may compile kernels, which no limit should be charged with.
            clock = clock or Clock(self.options.max_seconds)
            clock.check()
        return seconds

    @torch.no_grad()
    def _read(self, _: object = None) -> Any:
        """Read the prompt; returns the cache."""
        step = self.options.chunk or self.length
        cache: dict[str, Any] = {}
        for start in range(0, self.length, step):
            piece = self.prompt[:, start : start + step]
            output = self.model(input_ids=piece, use_cache=True, **cache, **self.few)
            cache = {"past_key_values": output.past_key_values}
        return cache["past_key_values"]

    def _prefill(self) -> dict[str, Any]:
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = self._times(self._read, lambda: None)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        rates = [self.length / s for s in seconds]
        return {
            **_median("tokens_per_s", rates),
            "peak_bytes": peak,
            "cache_bytes": cache_bytes(self._read()),
        }

    def _generate(self, ids: torch.Tensor, tokens: int, **inputs: Any) -> None:
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=self.pad,
            **inputs,
        )

    def _first_token(self) -> dict[str, Any]:
        pieces = {} if self.options.chunk is None else {"prefill_chunk_size": self.options.chunk}
        seconds = self._times(lambda _: self._generate(self.prompt, 1, **pieces), lambda: None)
        return _median("seconds", seconds)

    def _decode(self, batch: int) -> dict[str, Any]:
        first = self._read()
        if first is None:
            raise NotPossible("the model returns no cache")
        ids = torch.cat([self.prompt, self.prompt[:, :1]], 1).expand(batch, -1).contiguous()
        tokens = self.options.new_tokens

        def copies() -> Any:
            cache = copy.deepcopy(first)
            if batch > 1:
                cache.batch_repeat_interleave(batch)
            return cache

        def work(cache: Any) -> None:
            self._generate(ids, tokens, past_key_values=cache)

        seconds = self._times(work, copies)
        return _median("tokens_per_s", [batch * tokens / s for s in seconds])


def _median(name: str, values: list[float]) -> dict[str, Any]:
    return {
        name: statistics.median(values),
        "range": [min(values), max(values)],
        "n": len(values),
    }
