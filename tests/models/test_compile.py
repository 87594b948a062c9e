"""torch.compile of whole models: one graph, forwards and backwards, with the eager results."""

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from transformers import PreTrainedModel

import ssm_hf
from ssm_hf import (
    HybridForCausalLM,
    JambaForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    TaipanForCausalLM,
)
from tests.helpers import decide_, kernel_device, randomize_, relative_error, tiny

CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "mamba3-mimo": Mamba3ForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
    "taipan-selected": TaipanForCausalLM,
    "jamba": JambaForCausalLM,
}
# As many as there are kinds of layers.
LAYERS = {"ssm_hybrid": 3, "jamba": 2, "taipan": 2, "taipan-selected": 2}
each_type = pytest.mark.parametrize("model_type", list(CLASSES))
LENGTH = 9


def facts(kind: str) -> dict[str, Tensor]:
    device = kernel_device()
    if kind == "padded":
        return {"attention_mask": (torch.arange(LENGTH, device=device) > 2).long().expand(2, -1)}
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])
    if kind == "position_ids":
        return {"position_ids": positions[None].to(device)}
    return {"seq_idx": (positions == 0).cumsum(0).expand(2, -1).to(device)}


def loss_and_gradients(
    model: PreTrainedModel, run, ids: Tensor, bf16: bool, **options
) -> tuple[Tensor, list[Tensor]]:
    cast = torch.autocast(ids.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    with cast:
        loss = run(ids, labels=ids, use_cache=False, **options).loss
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def assert_compiled_equals_eager(
    model_type: str, kind: str, impl: str, backend: str, bf16: bool, **options
) -> None:
    device = kernel_device()
    torch._dynamo.reset()
    layers = LAYERS.get(model_type, 1)
    model = randomize_(CLASSES[model_type](tiny(model_type, num_hidden_layers=layers))).to(device)
    ids = torch.randint(3, 96, (2, LENGTH), device=device)
    model = decide_(model) if bf16 else model
    compiled = torch.compile(model.train(), fullgraph=True, backend=backend, dynamic=False)
    options |= {"bf16": bf16, **facts(kind)}
    with ssm_hf.implementation(impl):
        loss, grads = loss_and_gradients(model, compiled, ids, **options)
        expected, expected_grads = loss_and_gradients(model, model, ids, **options)
    # Compilers order additions, and under autocast roundings to 8 bits, in their own way. A's
    # gradient adds terms of both signs that cancel, their roundings do not (0.09 seen on a GPU).
    tolerance = 0.15 if bf16 else 1e-5
    assert relative_error(loss, expected) < tolerance
    for (name, _), grad, right in zip(model.named_parameters(), grads, expected_grads, strict=True):
        assert relative_error(grad, right) < tolerance, name


@pytest.mark.slow
@each_type
def test_torch_path_is_one_graph(model_type: str) -> None:
    assert_compiled_equals_eager(model_type, "position_ids", "reference", "aot_eager", bf16=True)


def only_traced(names: set[str]):
    """A backend that traces forwards and backwards and runs nothing: kernels take long without a
    GPU. It collects the names of our operators."""

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]):
        (output,) = graph.graph.find_nodes(op="output")
        values = [None if node is None else node.meta["val"] for node in output.args[0]]
        names.update(
            str(node.target).split(".")[1]
            for node in graph.graph.nodes
            if str(node.target).startswith("ssm_hf.")
        )

        def run(*_: Tensor) -> list[Tensor | None]:
            return [
                v if v is None else torch.zeros(v.shape, dtype=v.dtype, device=v.device)
                for v in values
            ]

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("mamba", "padded"), ("mamba2", "seq_idx"), ("mamba3-mimo", "padded")],
)
def test_kernels_are_one_graph(model_type: str, kind: str) -> None:
    names: set[str] = set()
    torch._dynamo.reset()
    device = kernel_device()
    model = CLASSES[model_type](tiny(model_type, num_hidden_layers=1)).train().to(device)
    compiled = torch.compile(model, fullgraph=True, backend=only_traced(names), dynamic=False)
    ids = torch.zeros(2, LENGTH, dtype=torch.long, device=device)
    with ssm_hf.implementation("triton"):
        loss_and_gradients(model, compiled, ids, True, return_logits=False, **facts(kind))
    inside = {"mamba": "mamba1_mix", "mamba2": "mamba2_mix"}.get(model_type, "mamba3_scan")
    for operator in (inside, "rms_norm"):
        assert any(name.startswith(f"{operator}_") and "bwd" not in name for name in names), names
        assert any(name.startswith(f"{operator}_bwd") for name in names), names
    assert any(name.startswith("linear_cross_entropy") for name in names), names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
# Inductor's advice on speed; in fp32 these tests want fp32.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
# Its softmax in one pass is not for the two scores of a gate.
@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled")
@each_type
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["seq_idx", "padded", "position_ids"])
def test_inductor_compiles_the_kernels(model_type: str, kind: str, bf16: bool) -> None:
    assert_compiled_equals_eager(model_type, kind, "triton", "inductor", bf16, return_logits=False)
