"""The models on a CUDA device against themselves on the CPU."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from ssm_hf import Mamba2ForCausalLM, MambaForCausalLM
from tests.helpers import randomize_, relative_error, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CLASSES = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}


@pytest.fixture(params=list(CLASSES))
def pair(request: pytest.FixtureRequest):
    model = randomize_(CLASSES[request.param](tiny(request.param))).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model, copy.deepcopy(model).cuda()


def test_logits_and_gradients_equal_the_cpus(pair) -> None:
    model, on_gpu = pair
    ids, mask = torch.randint(3, 96, (3, 50)), torch.ones(3, 50, dtype=torch.long)
    mask[0, :7], mask[1, -5:] = 0, 0
    doc = (torch.rand(3, 50) < 0.1).cumsum(1)
    for facts in ({"attention_mask": mask}, {"seq_idx": doc}):
        expected = model(ids, labels=ids, **facts)
        moved = {name: value.cuda() for name, value in facts.items()}
        got = on_gpu(ids.cuda(), labels=ids.cuda(), **moved)
        # fp32 rounding through three layers; tf32 is off by default.
        assert relative_error(got.logits.cpu(), expected.logits) < 1e-5
        wanted = torch.autograd.grad(expected.loss, list(model.parameters()))
        grads = torch.autograd.grad(got.loss, list(on_gpu.parameters()))
        for grad, right in zip(grads, wanted, strict=True):
            assert relative_error(grad.cpu(), right) < 1e-4


@torch.no_grad()
def test_generated_tokens_equal_the_cpus(pair) -> None:
    model, on_gpu = pair
    ids, mask = torch.randint(3, 96, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :7] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=30)
    for options in ({}, {"use_cache": False}):
        moved = {"attention_mask": mask.cuda(), **options}
        assert torch.equal(on_gpu.generate(ids.cuda(), max_new_tokens=30, **moved).cpu(), expected)
    row = {"attention_mask": mask[1:2].cuda(), "prompt_lookup_num_tokens": 4}
    assisted = on_gpu.generate(ids[1:2].cuda(), max_new_tokens=30, **row)
    assert torch.equal(assisted.cpu(), expected[1:2])


def test_bf16_autocast_trains_and_generates(pair) -> None:
    _, on_gpu = pair
    ids = torch.randint(3, 96, (3, 50)).cuda()
    expected = on_gpu(ids, labels=ids).loss
    with torch.autocast("cuda", torch.bfloat16):
        loss = on_gpu(ids, labels=ids).loss
        on_gpu.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    # 8 bits in each of three layers
    assert relative_error(loss, expected) < 3e-2
    for grad in torch.autograd.grad(loss, list(on_gpu.parameters())):
        assert torch.isfinite(grad).all()
