"""The one adapter between our models and lm-evaluation-harness."""

import logging
import sys
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedConfig

from eval.model import LoadedModel
from eval.options import LmEvalOptions
from eval.tasks.zero_shot import AVERAGED_TASKS, ZERO_SHOT_TASKS, build_tasks

UNLIMITED = sys.maxsize // 2  # the harness adds small numbers to it
LENGTH_FIELDS = ("n_positions", "max_position_embeddings", "n_ctx")


def length_limit(config: PreTrainedConfig) -> int | None:
    """Return the longest input that a model's config states, or None.

    Recurrent models have no limit and their configs no such field, for which the harness would
    assume 2048 and cut longer inputs.
    """
    limits = [getattr(config, name, None) for name in LENGTH_FIELDS]
    return next((limit for limit in limits if limit is not None), None)


class RecurrentLM(HFLM):
    """HFLM whose input length is explicit.

    Args:
        loaded: model and tokenizer.
        batch_size: requests per forward pass.
        max_length: longest input in tokens of scoring and generation; None is the config's limit,
            and none at all where the config states none.
        window: length after which rolling perplexity starts anew (the harness would use
            `max_length`, which may be unlimited).

    Raises:
        ValueError: the tokenizer has neither a bos nor an eos token to start texts with.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_size: int,
        max_length: int | None = None,
        window: int = 2048,
    ) -> None:
        if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
            raise ValueError("lm_eval needs a tokenizer with a bos or an eos token")
        log = logging.getLogger("lm_eval.models.huggingface")
        level = log.level
        # Its two warnings say that a model object is not spread over processes: intended here.
        log.setLevel(logging.ERROR)
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length or length_limit(loaded.model.config) or UNLIMITED,
        )
        log.setLevel(level)
        self._window = window

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # The harness takes the log-softmax in the dtype of the logits; in bfloat16 its sums over
        # a long answer would be off by whole nats.
        return super()._model_call(inps, attn_mask, labels).float()

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts in windows of `window` tokens, each from an empty state."""
        limit, self._max_length = self._max_length, min(self._window, self._max_length)
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._max_length = limit


def run_lm_eval(loaded: LoadedModel, options: LmEvalOptions, seed: int) -> dict[str, Any]:
    """Run zero-shot tasks.

    Args:
        loaded: the model.
        options: see `LmEvalOptions`.
        seed: of the harness' bootstrap and few-shot sampling.

    Returns:
        JSON values: `max_length` (null: unlimited), `tasks` with every metric's value, standard
        error (null where there is none) and the ones that papers report, and `average`, the
        papers' mean, when all tasks of the papers' mean were run, else null.
    """
    tasks, manager = build_tasks(options.tasks)
    adapter = RecurrentLM(loaded, batch_size=options.batch_size, max_length=options.max_length)
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
    results = {}
    for name, file in options.tasks.items():
        values = raw["results"][name]
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
            "n": raw["n-samples"][name]["effective"],
            "reported": list(ZERO_SHOT_TASKS[name].reported),
            "metrics": metrics,
        }
    average = None
    if all(name in results for name in AVERAGED_TASKS):
        scores = [
            results[name]["metrics"][ZERO_SHOT_TASKS[name].reported[0]]["value"]
            for name in AVERAGED_TASKS
        ]
        average = sum(scores) / len(scores)
    limit = adapter.max_length
    return {
        "max_length": None if limit == UNLIMITED else limit,
        "batch_size": options.batch_size,
        "limit": options.limit,
        "tasks": results,
        "average": average,
    }


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where it has no standard error."""
    return value if isinstance(value, (int, float)) else None
