"""What every kernel launch needs: tuned block sizes, the right device, deterministic or not."""

import functools
import json
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

# (kernel, architecture) -> {size class: {"BLOCK_...": ..., "num_warps": ..., "num_stages": ...}}
# Written by `python -m benchmarks.tune`; nothing is tuned while a program runs.
TUNED: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(
    files("ssm_hf.ops").joinpath("tuned.json").read_text()
)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def architecture(device: torch.device) -> str:
    """`"sm90"`, `"gfx942"`, ... of a GPU; `"cpu"` for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def tuned(kernel: str, size: str, device: torch.device) -> dict[str, int]:
    """Launch options of `kernel` for a size class on `device`.

    Looks for the architecture, then `"default"`; there for `size`, then `"default"`.

    Raises:
        KeyError: tuned.json does not know the kernel.
    """
    by_architecture = TUNED[kernel]
    by_size = by_architecture.get(architecture(device), by_architecture["default"])
    options = by_size.get(size) or by_size.get("default") or by_architecture["default"]["default"]
    # Triton's default for fused multiply-adds changes between its versions; ours does not.
    return {**options, "enable_fp_fusion": True}


def can_overlap(device: torch.device) -> bool:
    """Whether a GPU has programmatic dependent launch: NVIDIA's from Hopper on."""
    major = architecture(device).removeprefix("sm")[:-1]
    return major.isdigit() and int(major) >= 9


# Whether kernels that can overlap the one before them (programmatic dependent launch, Hopper and
# later) do so.
OVERLAP = True


def overlapping(wanted: bool, device: torch.device) -> dict[str, bool]:
    """Options of kernels that wait with `kernels_overlap.wait_for_previous`; see `OVERLAP`."""
    if OVERLAP and wanted and can_overlap(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


_PLAIN = frozenset(
    {Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, list}
)


def call(op: CustomOpDef, *args: Any) -> Any:
    """op(*args), without the operator's dispatch where nobody takes part in it.

    In plain inference the dispatch costs as much time of the host as the launch: no gradients, no
    tracing or transforms, no modes, no subclasses of tensors.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or not _PLAIN.issuperset(map(type, args))
    ):
        return op(*args)
    return op._init_fn(*args)


def common_unit(*strides: int) -> int:
    """Largest power of two up to 16 that divides all strides (0 counts as divisible).

    Triton sees only whether a stride is divisible by 16, and loads element by element where it is
    not. A kernel that takes strides in this unit and multiplies by it (a constexpr) loads rows of a
    wide projection in vectors of that many elements.
    """
    unit = 16
    while any(stride % unit for stride in strides):
        unit //= 2
    return unit


def unsupported_dtypes(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take tensors of these dtypes; None when they can."""
    for t in tensors:
        if t is not None and t.dtype not in KERNEL_DTYPES:
            return f"kernels take float32, float16 and bfloat16, got {t.dtype}"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one for the launches inside."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def check_tensors(op: str, dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Raise `ValueError` where tensors lie on different devices or have a dtype outside `dtypes`.

    The first tensor's device is the one expected; integer and bool tensors may have any dtype.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first, expected = next((name, t.device) for name, t in given.items())
    for name, t in given.items():
        if t.device != expected:
            raise ValueError(
                f"{op}: {name} lies on {t.device}, expected {expected}, where {first} lies"
            )
        if t.is_floating_point() and t.dtype not in dtypes:
            raise ValueError(
                f"{op}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, dtypes))}"
            )
