"""What training asks of a model, answered by our models themselves and here for all others."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from training.packing import IGNORED


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: a model's own choice; where it makes none, matrices are decayed and all
    the rest is not."""
    own = getattr(model, "parameter_groups", None)
    if own is not None:
        return own(weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def flops_per_token(model: PreTrainedModel, seq_len: int) -> int:
    """Of a forward pass: as the model counts them, else two for every parameter that multiplies
    (all but an embedding that is not the head too); attention's own products are left out."""
    own = getattr(model, "flops_per_token", None)
    if own is not None:
        return own(seq_len)
    embedding: Any = model.get_input_embeddings().weight
    is_tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
    parameters = sum(p.numel() for p in model.parameters())
    return 2 * (parameters - (0 if is_tied else embedding.numel()))


def loss_options(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of a forward pass that is made for its loss alone."""
    can_skip_logits = "return_logits" in inspect.signature(type(model).forward).parameters
    return {"use_cache": False, **({"return_logits": False} if can_skip_logits else {})}


def smoothing_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What smoothed targets add to the mean loss of labels, for each share that is spread.

    Cross-entropy of the even distribution less that of the labels (Szegedy et al. 2016, section 7):
    the normaliser cancels, and the label's logit less the mean of all is left.

    Args:
        logits: (B, T, V).
        labels: (B, T), each read one place earlier, as in transformers' losses.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    asked = labels != IGNORED
    of_label = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return ((of_label - logits.mean(2)) * asked).sum() / asked.sum().clamp(min=1)
