"""The models on a CUDA device against themselves on the CPU."""

import copy

import pytest
import torch
from transformers import GenerationConfig

import ssm_hf
from ssm_hf import (
    HybridForCausalLM,
    JambaForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    TaipanForCausalLM,
)
from tests.helpers import decide_, randomize_, relative_error, tiny
from training.graph import GraphedPass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "jamba": JambaForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
    "taipan-selected": TaipanForCausalLM,
    "mamba3-mimo": Mamba3ForCausalLM,
}


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
        # fp32 rounding through three layers; tf32 is off by default. Pads have no logits.
        real = facts["attention_mask"].bool() if "attention_mask" in facts else doc >= 0
        assert relative_error(got.logits.cpu()[real], expected.logits[real]) < 1e-5
        wanted = torch.autograd.grad(expected.loss, list(model.parameters()))
        grads = torch.autograd.grad(got.loss, list(on_gpu.parameters()))
        names = (name for name, _ in model.named_parameters())
        for name, grad, right in zip(names, grads, wanted, strict=True):
            # A gate's bias gets the small rest of a sum over all tokens: 1.5e-4, torch path or not.
            tolerance = 1e-3 if name.endswith("gate.bias") else 1e-4
            assert relative_error(grad.cpu(), right) < tolerance, name


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
    on_gpu = decide_(pair[1])
    ids = torch.randint(3, 96, (3, 50)).cuda()
    expected = on_gpu(ids, labels=ids).loss
    with torch.autocast("cuda", torch.bfloat16):
        loss = on_gpu(ids, labels=ids).loss
        on_gpu.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    # 8 bits in each of three layers
    assert relative_error(loss, expected) < 3e-2
    for grad in torch.autograd.grad(loss, list(on_gpu.parameters())):
        assert torch.isfinite(grad).all()


def packings() -> dict[str, dict[str, torch.Tensor | int]]:
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 1, 29]))[None].cuda()
    offsets = torch.tensor([0, 20, 21, 50], dtype=torch.int32).cuda()
    positions = torch.cat([torch.arange(n) for n in (20, 1, 29)])[None].cuda()
    mask = torch.ones(1, 50, dtype=torch.long).cuda()
    return {
        "nothing": {},
        "mask of ones": {"attention_mask": mask},
        "padding": {"attention_mask": mask * (torch.arange(50).cuda() > 4)},
        "positions": {"position_ids": positions},
        "positions of one document": {"position_ids": torch.arange(50)[None].cuda()},
        "negative numbers": {"seq_idx": numbers.masked_fill(numbers == 1, -1)},
        "all": {"position_ids": positions, "seq_idx": numbers, "cu_seq_lens_q": offsets,
                "cu_seq_lens_k": offsets, "max_length_q": 29, "max_length_k": 29},
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("return_logits", [True, False])
def test_training_pass_never_waits_for_the_gpu(pair, return_logits: bool) -> None:
    """And gives what the CPU gives, where masks of ones and single documents are dropped."""
    model, on_gpu = pair
    ids = torch.randint(3, 96, (1, 50))
    on_device, options = ids.cuda(), {"use_cache": False, "return_logits": return_logits}
    for name, given in packings().items():
        on_gpu(on_device, labels=on_device, **options, **given).loss.backward()  # compiles
        on_gpu.zero_grad()
        try:
            torch.cuda.set_sync_debug_mode("error")
            loss = on_gpu(on_device, labels=on_device, **options, **given).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        expected = model(ids, labels=ids, **options, **on_cpu).loss
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        assert relative_error(loss.cpu(), expected) < 1e-5, name
        for p, right in zip(on_gpu.parameters(), wanted, strict=True):
            assert relative_error(p.grad.cpu(), right) < 1e-4, name


# Checkpointed experts keep nodes of the uncaptured passes, which ran on another stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize(("checkpointed", "kept"), [(False, False), (True, False), (False, True)])
def test_replayed_pass_equals_the_eager_one(pair, checkpointed: bool, kept: bool) -> None:
    model = decide_(copy.deepcopy(pair[1])).train()
    graphed_model = copy.deepcopy(model)
    if checkpointed:
        enable = getattr(
            graphed_model,
            "activation_checkpointing_enable",
            graphed_model.gradient_checkpointing_enable,
        )
        enable({"use_reentrant": False, "preserve_rng_state": False})

    def passes(net):
        def run(batch, share):
            with torch.autocast("cuda", torch.bfloat16), ssm_hf.keep_activations(kept):
                loss = net(**batch, use_cache=False, return_logits=False).loss * share
            loss.backward()
            return loss.detach()

        return run

    eager = passes(model)
    graphed = GraphedPass(passes(graphed_model), graphed_model.parameters())
    # Three micro-batches a step, three steps; the last one has another shape.
    for step, length in enumerate((50, 50, 31)):
        for i, share in enumerate(torch.tensor([0.25, 0.25, 0.5]).cuda()):
            ids = torch.randint(3, 96, (2, length)).cuda()
            positions = (torch.arange(length) % 17)[None].expand(2, -1).cuda()
            batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
            loss = graphed(batch, share, is_first=i == 0)
            # The same kernels on the same numbers; sums of tied weights may change their order.
            assert relative_error(loss, eager(batch, share)) < 1e-6
        for (name, p), q in zip(model.named_parameters(), graphed_model.parameters(), strict=True):
            assert relative_error(q.grad, p.grad) < 1e-5, (step, name)
        model.zero_grad()
        with torch.no_grad():  # what an optimiser does: weights in 16 bits are to follow
            for p in (*model.parameters(), *graphed_model.parameters()):
                p.mul_(1.01)


def test_replays_draw_new_noise_and_the_same_after_the_same_seed() -> None:
    model = TaipanForCausalLM(tiny("taipan", gumbel_noise=1.0)).train().cuda()

    def run(batch, share):
        out = model(**batch, use_cache=False, return_logits=False)
        (out.loss * share).backward()
        return out.gate_fractions.mean()

    ids = torch.randint(3, 96, (4, 50)).cuda()
    graphed, share = GraphedPass(run, model.parameters()), torch.ones((), device="cuda")
    shares = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        batch = {"input_ids": ids, "labels": ids}
        shares += [float(graphed(batch, share, is_first=True)) for _ in range(3)]
    assert len(set(shares[:3])) > 1
    assert shares[:3] != shares[3:6]
    assert shares[:3] == shares[6:]


def test_kernels_compiled_ahead_are_the_ones_that_run(pair) -> None:
    _, model = pair
    ids = torch.randint(3, 96, (2, 33)).cuda()

    def run() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False, return_logits=False).loss
        loss.backward()
        return loss

    expected = run()
    model.zero_grad()
    with ssm_hf.compile_ahead():
        run()
    model.zero_grad()
    assert torch.equal(run(), expected)
