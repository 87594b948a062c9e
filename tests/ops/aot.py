"""Compiles every kernel to machine code for GPUs that this machine does not have.

    python -m tests.ops.aot [--all] sm80 sm90 sm100 gfx942 [WORD]

The operators are called as users call them, with tensors that nobody reads: launches compile with
the tuned options of the architecture and do not run. Each `aot_cases()` of tests/ops/aot_cases/
yields (name, call) pairs. Of every kernel the first launch is compiled, with `--all` every one; a
WORD chooses cases by name. Triton's interpreter must be off, so this is a process of its own.
"""

import importlib
import os
import pkgutil
import sys
import time
from typing import Any

import torch

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory that one program can have.
SHARED = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}


class _NoGPU:
    """Stands in for a driver: names a target, and has nothing that could run a kernel."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Kernels remember what they compiled by device: each target is one of its own.
        target = (self.target.backend, self.target.arch, self.target.warp_size)
        return list(TARGETS.values()).index(target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no GPU: {name}")


def compile_for(architecture: str, only: str = "", every: bool = False) -> list[str]:
    """Compile the cases for one architecture; return the names of the compiled kernels.

    Without `every`, a kernel that is compiled already is not compiled for other arguments.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ssm_hf.ops import dispatch, launch

    driver.set_active(_NoGPU(GPUTarget(*TARGETS[architecture])))
    launch.architecture = lambda device: architecture
    launch.processors = lambda device: 132
    launch.tuned.cache_clear()
    dispatch.why_not_triton = lambda op, device: None
    compiled: list[str] = []
    launched: list[str] = []
    kinds: set[tuple[str, int | None]] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(self.__name__)
        # The scan's states are saved in two ways, which are two kernels in all but the name.
        kind = (self.__name__, kwargs.get("EVERY"))
        if kind in kinds and not every:
            return None
        kinds.add(kind)
        # Grids that depend on the options are functions; a wrong one would fail on a GPU only.
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel is not None, f"{self.__name__} did not compile"
        asm = kernel.asm["amdgcn" if "amdgcn" in kernel.asm else "ptx"]
        assert asm, f"{self.__name__}: no machine code"
        shared = kernel.metadata.shared
        assert shared <= SHARED[architecture], f"{self.__name__}: {shared} bytes of shared memory"
        compiled.append(self.__name__)
        return kernel

    JITFunction.run = compile_only
    try:
        import tests.ops.aot_cases as package

        for module in pkgutil.iter_modules(package.__path__):
            cases = importlib.import_module(f"{package.__name__}.{module.name}").aot_cases
            for name, call in cases():
                if only and only not in f"{module.name}:{name}":
                    continue
                began, before = time.perf_counter(), len(compiled)
                launched.clear()
                call()
                assert launched, f"{module.name}:{name} launched no kernel"
                kernels = ", ".join(sorted(set(compiled[before:])))
                seconds = time.perf_counter() - began
                print(f"{architecture} {module.name}:{name} {seconds:.1f} s: {kernels}", flush=True)
    finally:
        JITFunction.run = run
    return compiled


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "interpreted kernels cannot be compiled"
    arguments = [a for a in sys.argv[1:] if a != "--all"]
    names = [a for a in arguments if a in TARGETS]
    only = next((a for a in arguments if a not in TARGETS), "")
    for name in names or TARGETS:
        compiled = compile_for(name, only, every="--all" in sys.argv)
        print(f"{name}: {len(compiled)} launches compiled")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
