"""The one adapter between causal language models and lm-evaluation-harness."""

import hashlib
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lm_eval
import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from eval.model import LoadedModel, length_limit, load_model, require_eos
from eval.options import LmEvalOptions
from eval.parallel import processes
from eval.published import averages, compare_published
from eval.samples import SampleStore
from eval.tasks.zero_shot import ZERO_SHOT_TASKS, build_tasks

log = logging.getLogger(__name__)

UNLIMITED = sys.maxsize // 2  # the harness adds small numbers to it
# Where the search for a batch size begins; too large a batch costs one attempt, memory on a CPU
# is not so forgiving.
FIRST_BATCH = {"cuda": 256, "cpu": 16}


@register_model("ssm_hf")
class CausalLM(HFLM):
    """HFLM for any causal model, with what the harness leaves to chance made explicit.

    - Input length: `max_length`, or the config's, or unlimited; never a silent 2048.
    - Scoring pads on the right without a mask: pads come after all that is scored, so no causal
      model sees them. Generation pads on the left, with a mask.
    - A batch that does not fit in memory is halved, and the run goes on.
    - With several processes (`accelerate launch`) each takes a share of the requests. To the
      harness it is one process that answers all of them.
    - With a folder for `samples` every answer is on disk when it is known, and is not asked again.

    Args:
        pretrained: a loaded model, or the directory or Hub name of one.
        batch_size: requests per forward pass; "auto" begins with 256 on a GPU and 16 on a CPU.
        max_length: longest input in tokens of scoring and generation; None is the config's limit,
            and none at all where the config states none.
        window: length after which rolling perplexity starts anew (the harness would use
            `max_length`, which may be unlimited).
        bos: "tokenizer": inputs begin as the tokenizer begins them; "always": with the bos token
            (eos where there is none); "never": with the first token of the text.
        samples: folder for finished answers, one file a task.
        dtype, device: of a model that is given by name, see `load_model`.
        max_batch_size: where "auto" begins.

    Raises:
        ValueError: the tokenizer has no eos token, or weights are missing.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        *,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        window: int = 2048,
        bos: Literal["tokenizer", "always", "never"] = "tokenizer",
        samples: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        if bos not in ("tokenizer", "always", "never"):
            raise ValueError(f'bos must be "tokenizer", "always" or "never", got {bos!r}')
        if isinstance(pretrained, str):
            loaded = load_model(pretrained, dtype=str(dtype), device=device, prefix="auto")
        else:
            loaded = pretrained
        require_eos(loaded.tokenizer, "lm_eval")
        if batch_size == "auto":
            batch_size = max_batch_size or FIRST_BATCH.get(loaded.model.device.type, 16)
        harness_log = logging.getLogger("lm_eval.models.huggingface")
        level = harness_log.level
        # Its two warnings say that a model object is not spread over processes: done below.
        harness_log.setLevel(logging.ERROR)
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            batch_size=int(batch_size),
            max_length=max_length or length_limit(loaded.model.config) or UNLIMITED,
        )
        harness_log.setLevel(level)
        self._identity = loaded.identity
        self._limit = self._max_length
        self._window = window
        self._bos = bos
        self._samples = None if samples is None else Path(samples)
        self._stores: dict[str, SampleStore] = {}
        self._answers: dict[str, Any] = {}
        self._open: dict[str, list[str]] = {}  # request -> the keys that wait for its answer
        self._asked: dict[str, Instance] = {}
        self._copies: Counter[str] = Counter()
        self._quiet = False
        self.set_cache_hook(self)  # HFLM tells it each answer, see add_partial

    # --- what the model reads ---------------------------------------------------------------

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if self._bos == "tokenizer" or add_special_tokens is False:
            ids = super().tok_encode(string, add_special_tokens, **kwargs)
        else:
            start = [self.prefix_token_id] if self._bos == "always" else []
            ids = start + self.tokenizer.encode(string, add_special_tokens=False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.tok_encode(string) for string in strings]
        longest = max(map(len, rows))
        if left_truncate_len and longest > left_truncate_len:
            log.warning(
                "a prompt of %d tokens loses its beginning: only %d fit in max_length %d",
                longest,
                left_truncate_len,
                self.max_length,
            )
            rows = [row[-left_truncate_len:] for row in rows]
        batch = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=padding_side, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # The harness takes the log-softmax in the dtype of the logits; in bfloat16 its sums over
        # a long answer would be off by whole nats.
        return super()._model_call(inps, attn_mask, labels).float()

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(requests, disable_tqdm or self._quiet, override_bs)

    # --- what it is asked -------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        answers = self._answer("loglikelihood", requests, super().loglikelihood, disable_tqdm)
        return [(value, greedy) for value, greedy in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answer("generate_until", requests, super().generate_until, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts in windows of `window` tokens, each from an empty state."""
        whole_text = super().loglikelihood_rolling

        def compute(requests: list[Instance], disable_tqdm: bool) -> None:
            bar = tqdm(requests, desc="Running rolling requests", disable=disable_tqdm)
            for request in bar:
                whole_text([request], disable_tqdm=True)

        limit, self._max_length = self._max_length, min(self._window, self._max_length)
        self._quiet = True
        try:
            return self._answer("loglikelihood_rolling", requests, compute, disable_tqdm)
        finally:
            self._max_length, self._quiet = limit, False

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[list[Instance], bool], Any],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answer requests: from what is known, and the rest by `compute`, which calls add_partial.

        Requests that are equal are asked once, unless they are to be sampled: those are all
        asked, and never taken from disk.
        """
        keys = []
        for request in requests:
            key = _request_key(kind, request.args)
            if _is_sampled(request.args):
                self._copies[key] += 1
                key = f"{key}-{self._copies[key]}"
            elif (store := self._store(request)) is not None and key in store.done:
                self._answers[key] = store.done[key]["answer"]
            keys.append(key)
            self._asked.setdefault(key, request)
        group = processes()
        # A share of all keys and not of those left: a process that is late sees fewer left.
        mine = list(dict.fromkeys(keys))[group.process_index :: group.num_processes]
        quiet = disable_tqdm or not group.is_main_process
        while left := [key for key in mine if key not in self._answers]:
            self._open = {}
            for key in left:
                self._open.setdefault(key.partition("-")[0], []).append(key)
            try:
                compute([self._asked[key] for key in left], quiet)
                break
            except RuntimeError as error:
                if self.batch_size_per_gpu == 1 or not should_reduce_batch_size(error):
                    raise
            # Out of memory; after the handler, whose error keeps the tensors of the batch alive.
            clear_device_cache(garbage_collection=True)
            self.batch_size_per_gpu //= 2
            log.warning("out of memory: batches of %d from here on", self.batch_size_per_gpu)
        if missing := [key for key in mine if key not in self._answers]:
            raise RuntimeError(f"the harness gave no answer to {self._asked[missing[0]].args!r}")
        self._answers |= gather_object([(key, self._answers[key]) for key in mine])
        return [self._answers[key] for key in keys]

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Take one answer (the harness' cache hook)."""
        request_key = _request_key(attr, tuple(req))
        value = res if attr == "loglikelihood_rolling" else res[0]
        if attr != "generate_until" and not math.isfinite(value):
            raise ValueError(f"the log-likelihood of {tuple(req)!r:.200} is {value}")
        key = self._open[request_key].pop()
        self._answers[key] = res
        request = self._asked[key]
        store = None if _is_sampled(request.args) else self._store(request)
        if store is not None:
            store.add(key, {"doc": request.doc_id, "part": request.idx, "answer": res})

    def _store(self, request: Instance) -> SampleStore | None:
        """Return the store of a request's task, None where nothing is to be kept."""
        if self._samples is None:
            return None
        task = (request.task_name or "requests").replace("/", "_")
        if task not in self._stores:
            settings = {
                "max_length": self._limit,
                "window": self._window,
                "bos": self._bos,
                "lm_eval": version("lm_eval"),
            }
            self._stores[task] = SampleStore(
                self._samples,
                model=self._identity,
                section="lm_eval",
                task=task,
                settings=settings,
            )
        return self._stores[task]


def _request_key(kind: str, arguments: tuple[Any, ...]) -> str:
    text = json.dumps([kind, *arguments], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def _is_sampled(arguments: tuple[Any, ...]) -> bool:
    settings = arguments[-1]
    return isinstance(settings, dict) and bool(
        settings.get("do_sample") or settings.get("temperature")
    )


def run_lm_eval(
    loaded: LoadedModel, options: LmEvalOptions, seed: int, samples: Path | None = None
) -> dict[str, Any]:
    """Run zero-shot tasks.

    Args:
        loaded: the model.
        options: see `LmEvalOptions`.
        seed: of the harness' bootstrap and few-shot sampling.
        samples: folder of finished answers, see `CausalLM`.

    Returns:
        JSON values: `max_length` (null: unlimited), `tasks` with every metric's value, standard
        error (null where there is none) and the ones that papers report, `averages`, each paper's
        mean whose tasks were all run, and `published`, the table of the released model that
        `options.published` names, beside these results (else null).
    """
    tasks, manager = build_tasks(options.tasks)
    adapter = CausalLM(
        loaded,
        batch_size=options.batch_size or "auto",
        max_length=options.max_length,
        bos=options.bos,
        samples=samples,
    )
    raw = lm_eval.simple_evaluate(
        model=adapter,
        tasks=tasks,
        task_manager=manager,
        limit=options.limit,
        bootstrap_iters=options.bootstrap_iters,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    # All processes have all answers, but the harness sums up in the first one only.
    parts = [None if raw is None else (raw["results"], raw["n-samples"])]
    ((scores, numbers),) = broadcast_object_list(parts)
    results = {}
    for name, file in options.tasks.items():
        values = scores[name]
        metrics = {
            key.removesuffix(",none"): {
                "value": value,
                "stderr": _number(values.get(key.replace(",none", "_stderr,none"))),
            }
            for key, value in values.items()
            if key.endswith(",none") and not key.endswith("_stderr,none")
        }
        results[name] = {
            "file": file,
            "n": numbers[name]["effective"],
            "reported": list(ZERO_SHOT_TASKS[name].reported),
            "metrics": metrics,
        }
    limit = adapter.max_length
    return {
        "max_length": None if limit == UNLIMITED else limit,
        "bos": options.bos,
        "batch_size": adapter.batch_size,
        "limit": options.limit,
        "tasks": results,
        "averages": averages(results),
        "published": compare_published(options.published, results),
    }


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where it has no standard error."""
    return value if isinstance(value, (int, float)) else None
