"""Which implementation of an operator runs, and why: the only place that decides.

`impl="reference"` is the vectorised torch path, `"triton"` the GPU kernels, `"auto"` the fastest
one that can run. An explicit request that cannot be met raises; `auto` steps down with one line in
the log.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import torch

Impl = Literal["auto", "reference", "triton"]
_CHOICES: tuple[Impl, ...] = get_args(Impl)
OPERATORS = (
    "add_rms_norm",
    "causal_conv1d",
    "gated_linear",
    "interval_attention",
    "linear_cross_entropy",
    "linear_scan",
    "mamba1_mix",
    "mamba2_mix",
    "mamba3_scan",
    "moe_experts",
    "moe_route",
    "norm_linear",
    "norm_proj",
    "rms_norm",
    "rows_linear",
    "selective_scan",
    "ssd",
)

logger = logging.getLogger("ssm_hf")
_forced: list[Impl] = []
_keeping: list[bool] = []
_told: set[str] = set()
_Run = TypeVar("_Run", bound=Callable[..., object])


class ImplementationUnavailableError(RuntimeError):
    """An implementation was asked for by name and cannot run here; the message says why."""


HAS_TRITON = importlib.util.find_spec("triton") is not None
_WITHOUT_KERNEL = ("linear_scan",)
# Kernels that no GPU has held to their reference yet, as they stand. On a GPU they run on request
# alone: a wrong number would be found by nobody. A line goes when `python -m tests.ops.grid` and
# the operator's own tests have passed there.
_UNPROVEN: tuple[str, ...] = ()


# Triton decides this when a kernel is defined, so here too it is decided once.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(op: str, device: torch.device) -> str | None:
    """Reason why the Triton kernel of `op` cannot run on tensors of `device`; None when it can."""
    if op in _WITHOUT_KERNEL:
        return f"this version of ssm_hf has no Triton kernel for {op}"
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton)"
    if device.type != "cuda" and not _INTERPRETED:
        return f"Triton kernels need a GPU, and the tensors lie on {device.type}"
    return None


def _obstacle(op: str, device: torch.device, wanted: str) -> str | None:
    """Reason why the Triton kernel of `op` is not taken by `wanted`; None when it is."""
    reason = why_not_triton(op, device)
    if reason is None and wanted == "auto":
        if device.type != "cuda":
            # A debugging tool, a thousand times slower.
            return "Triton's interpreter runs only on request"
        if op in _UNPROVEN:
            return 'its kernels have not been checked on a GPU yet; impl="triton" takes them'
    return reason


def _wanted(impl: str) -> Impl:
    source = "impl"
    if impl == "auto" and _forced:
        impl, source = _forced[-1], "implementation(...)"
    elif impl == "auto" and "SSM_HF_IMPL" in os.environ:
        impl, source = os.environ["SSM_HF_IMPL"], "environment variable SSM_HF_IMPL"
    for choice in _CHOICES:
        if impl == choice:
            return choice
    raise ValueError(f"{source} must be one of {_CHOICES}, got {impl!r}")


def pick(
    op: str,
    impl: str,
    device: torch.device,
    *,
    reference: _Run,
    triton: _Run | None = None,
    unsupported: str | None = None,
) -> _Run:
    """Return the callable that runs operator `op` on tensors of `device`.

    Args:
        op: operator name, for messages.
        impl: `"auto"`, `"reference"` or `"triton"`; `"auto"` obeys `implementation(...)` and then
            the environment variable `SSM_HF_IMPL`.
        device: device of the operator's inputs.
        reference: vectorised torch path.
        triton: kernel launcher, or None where no kernel exists or Triton is not installed.
        unsupported: why the kernels cannot take these arguments (a size or dtype outside what they
            support, with the supported values), or None when they can.

    Raises:
        ImplementationUnavailableError: `"triton"` was asked for and cannot run.
        ValueError: `impl` is none of the three words.
    """
    wanted = _wanted(impl)
    if wanted == "reference":
        return reference
    reason = _obstacle(op, device, wanted) or unsupported
    if reason is None and triton is not None:
        return triton
    if wanted == "triton":
        raise ImplementationUnavailableError(
            f'impl="triton" was requested for {op}, but {reason}; use impl="auto" or "reference"'
        )
    # On a CPU the torch path is what one expects; elsewhere it is slower than it could be: say so.
    quiet = device.type in ("cpu", "meta") or torch.compiler.is_compiling()
    if not quiet and op not in _told:
        _told.add(op)
        logger.warning("%s runs its torch path on %s: %s", op, device.type, reason)
    return reference


def chosen_impl() -> Impl:
    """What `impl="auto"` stands for at this moment: of the context, the environment, or itself."""
    return _wanted("auto")


def runs_kernels(op: str, device: torch.device) -> bool:
    """Whether `impl="auto"` takes the Triton kernel of `op` on `device`."""
    wanted = _wanted("auto")
    return wanted != "reference" and _obstacle(op, device, wanted) is None


@contextmanager
def implementation(impl: Impl) -> Generator[None, None, None]:
    """Within the block, `impl="auto"` means `impl`: for tests and for hunting down a difference."""
    _forced.append(_wanted(impl) if impl != "auto" else "auto")
    try:
        yield
    finally:
        _forced.pop()


def keeps_activations() -> bool:
    """Whether training operators keep what they could form again; see `keep_activations`."""
    return bool(_keeping) and _keeping[-1]


@contextmanager
def keep_activations(keep: bool = True) -> Generator[None, None, None]:
    """Within the block, training operators keep for their backward pass what else they would form
    again in it: norms, convolutions, step sizes, weights in 16 bits and, in bf16 and of up to 16,
    Mamba-1's states. A few percent faster for half as much memory again, Mamba-1 16 % for twice
    the memory. Forward and backward pass both belong into the block."""
    _keeping.append(keep)
    try:
        yield
    finally:
        _keeping.pop()


def implementations(device: torch.device | str | None = None) -> dict[str, tuple[str, str]]:
    """For every operator: which implementation `impl="auto"` takes on `device`, and the reason.

    Args:
        device: where the tensors lie; default the first CUDA device, else the CPU.

    Returns:
        `{operator: ("triton" | "reference", reason)}`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    wanted = _wanted("auto")
    table: dict[str, tuple[str, str]] = {}
    for op in OPERATORS:
        reason = _obstacle(op, device, wanted)
        if wanted == "reference":
            table[op] = ("reference", "requested by implementation(...) or SSM_HF_IMPL")
        elif reason is None:
            table[op] = ("triton", f"Triton kernels run on {device.type}")
        elif wanted == "triton":
            table[op] = ("error", f'"triton" is requested, but {reason}')
        else:
            table[op] = ("reference", reason)
    return table


def print_implementations(device: torch.device | str | None = None) -> None:
    """Print the table of `implementations`, one operator a line."""
    for op, (impl, reason) in implementations(device).items():
        print(f"{op:<16} {impl:<10} {reason}")
