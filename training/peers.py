"""What training asks of a model, answered by our models themselves and here for all others."""

import inspect
from typing import Any

from transformers import PreTrainedModel


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
