import contextlib
import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from transformers import AutoTokenizer

import ssm_hf
from tests.helpers import tiny
from training.checkpoint import (
    CheckpointError,
    TrainerState,
    check_same_data,
    checkpoints,
    find_checkpoint,
    keep_weights_out_of_state,
    load_trainer_state,
    remove_leftovers,
    save_checkpoint,
    save_model,
    whole_directory,
)

STATE = TrainerState(step=1, samples=4, tokens=64, data={"seed": 0, "rows": "abc"})


@pytest.fixture
def trainer():
    """An accelerator and a prepared model whose optimiser has taken a step."""
    accelerator = Accelerator(cpu=True)
    model = ssm_hf.Mamba2ForCausalLM(tiny("mamba2", vocab_size=264))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    keep_weights_out_of_state(accelerator)
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return accelerator, model, optimizer


@pytest.fixture
def save(trainer, tmp_path):
    accelerator, model, _ = trainer

    def save_step(step: int, keep_last: int = 2):
        state = replace(STATE, step=step)
        return save_checkpoint(
            tmp_path, accelerator, model, ssm_hf.byte_tokenizer(), state, keep_last
        )

    return save_step


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """Let the system fail every write beyond so many bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_checkpoint_holds_model_tokenizer_optimizer_and_place(trainer, save):
    accelerator, model, optimizer = trainer
    path = save(1)
    assert load_trainer_state(path) == STATE
    loaded = ssm_hf.Mamba2ForCausalLM.from_pretrained(path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert len(AutoTokenizer.from_pretrained(path)) == 264
    assert not list((path / "state").glob("*.safetensors"))  # the weights are there once

    moments = {k: v.clone() for k, v in optimizer.state_dict()["state"][0].items()}
    random_state = torch.get_rng_state()
    torch.rand(3)
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    accelerator.load_state(str(path / "state"))
    for key, value in moments.items():
        assert torch.equal(optimizer.state_dict()["state"][0][key], value), key
    assert torch.equal(torch.get_rng_state(), random_state)


def test_compiled_model_is_saved_under_its_own_names(tmp_path):
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    model = ssm_hf.Mamba2ForCausalLM(tiny("mamba2", vocab_size=264))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = accelerator.prepare(model)
    assert any("_orig_mod" in name for name in compiled.state_dict())
    save_model(accelerator, compiled, ssm_hf.byte_tokenizer(), tmp_path)
    loaded = ssm_hf.Mamba2ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(loaded[name], value), name


def test_only_the_last_are_kept(save, tmp_path):
    for step in (1, 2, 3):
        save(step)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert [path.name for path in checkpoints(tmp_path)] == names(tmp_path)


# The weights, the optimiser state and the place are written by three libraries, each with its own
# way to report a failed write; the sizes let the write fail in each of them.
@pytest.mark.parametrize("n_bytes", [10, 20_000, 150_000])
def test_failed_save_leaves_the_last_checkpoint_loadable(save, tmp_path, n_bytes):
    good = save(1, keep_last=1)
    with (
        largest_file(n_bytes),
        pytest.raises(CheckpointError, match=r"could not write .*step-00000002: .*untouched"),
    ):
        save(2, keep_last=1)
    assert names(tmp_path) == ["step-00000001"]
    assert find_checkpoint(tmp_path, "auto") == good
    ssm_hf.Mamba2ForCausalLM.from_pretrained(good)
    save(2, keep_last=1)
    assert names(tmp_path) == ["step-00000002"]


def test_interrupted_save_is_ignored_and_cleaned(save, tmp_path):
    good = save(1)
    half = tmp_path / "checkpoints" / ".incomplete-step-00000002"
    shutil.copytree(good, half)
    (half / "model.safetensors").unlink()
    assert find_checkpoint(tmp_path, "auto") == good
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_interrupted_replacement_keeps_the_good_directory(save, tmp_path):
    good = save(1)
    for leftover in (".replaced-step-00000001", ".replaced-step-00000002"):
        shutil.copytree(good, good.with_name(leftover))
    remove_leftovers(tmp_path)  # the second was never replaced: it is the only copy
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_whole_directory_replaces_and_removes_on_failure(tmp_path):
    accelerator = Accelerator(cpu=True)
    target = tmp_path / "final"
    for content in ("one", "two"):
        with whole_directory(target, accelerator) as folder:
            (folder / "file").write_text(content)
            assert not (folder.parent / "final" / "file").exists() or content == "two"
    assert (target / "file").read_text() == "two"
    with pytest.raises(CheckpointError, match="could not write"), largest_file(3):  # noqa: SIM117
        with whole_directory(target, accelerator) as folder:
            (folder / "file").write_text("three")
    assert (target / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_resume_finds_the_right_checkpoint(save, tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path, "never") is None
    first, second = save(1), save(12)
    assert find_checkpoint(tmp_path, "auto") == second
    assert find_checkpoint(tmp_path / "elsewhere", str(first)) == first
    with pytest.raises(
        CheckpointError, match=r"resume is 'never', but run_dir .* holds step-00000012"
    ):
        find_checkpoint(tmp_path, "never")
    with pytest.raises(CheckpointError, match=r"is of step 1, but run_dir .* holds step-00000012"):
        find_checkpoint(tmp_path, str(first))
    with pytest.raises(CheckpointError, match=r"no checkpoint there \(.*trainer.json is missing\)"):
        find_checkpoint(tmp_path, str(tmp_path))


def test_resume_on_other_data_is_refused(save):
    path = save(1)
    state = load_trainer_state(path)
    check_same_data(state, {"seed": 0, "rows": "abc"}, path)
    with pytest.raises(CheckpointError, match="the data differs: rows was 'abc', is 'xyz'"):
        check_same_data(state, {"seed": 0, "rows": "xyz"}, path)
    assert json.loads((path / "state" / "trainer.json").read_text())["samples"] == 4
