"""A decoding step of several rows: updates are left as shares, which the next norm adds up."""

import copy
from typing import Any

import pytest
import torch

from ssm_hf import (
    HybridConfig,
    HybridForCausalLM,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    RecurrentCache,
    implementation,
)
from ssm_hf.layers import mamba1, mamba2
from ssm_hf.ops import launch
from tests.helpers import randomize_, tiny


def _hybrid() -> Any:
    """Shares go into another kind of block, and the embedding's stream into both."""
    options = {"mamba2": {"head_dim": 16, "state_size": 8}, "mamba1": {"state_size": 4}}
    blocks = ["mamba2", "mlp", "mamba1", "mamba2"]
    return HybridConfig(vocab_size=50, hidden_size=32, blocks=blocks, options=options)


MODELS = {
    "mamba": (lambda: MambaForCausalLM(tiny("mamba")), 1),
    "mamba2, groups": (lambda: Mamba2ForCausalLM(tiny("mamba2")), 1),
    "mamba2": (lambda: Mamba2ForCausalLM(tiny("mamba2", n_groups=1)), 1),
    "hybrid": (lambda: HybridForCausalLM(_hybrid()), 1),
    "hybrid, tickets": (lambda: HybridForCausalLM(_hybrid()), 10**6),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU captured steps are compared")
@pytest.mark.parametrize("name", MODELS)
def test_rows_step_is_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, processors = MODELS[name]
    # So many processors have no work for programs that walk through tiles of the state.
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    model = randomize_(make()).eval()
    ids = torch.randint(3, 20, (5, 7))
    cache = RecurrentCache(model.config)
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache)
        fused = copy.deepcopy(cache)
        wanted = model(ids[:, -1:], past_key_values=cache, output_hidden_states=True)
        asked = []
        for module in (mamba1, mamba2):
            monkeypatch.setattr(module, "some_rows", lambda *given: asked.append(given) or True)
        with implementation("triton"):
            got = model(ids[:, -1:], past_key_values=fused, output_hidden_states=True)
    assert len(asked) > 1
    # fp32 sums in another order
    close = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(got.logits, wanted.logits, **close)
    for one, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other, **close)
    for one, other in zip(fused.stateful, cache.stateful, strict=True):
        for key, tensor in one.state.items():
            torch.testing.assert_close(tensor, other.state[key], **close)
