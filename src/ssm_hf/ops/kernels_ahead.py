"""Compiles the kernels of a first call side by side, instead of one after another as it runs."""

import os
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@contextmanager
def compile_ahead(threads: int | None = None) -> Generator[None, None, None]:
    """Within the block no kernel of Triton's runs: each is compiled, by several threads at once.

    Run a model's forward and backward pass inside; what it returns is garbage, since the kernels
    wrote nothing. The same pass afterwards finds all its kernels ready. Leaving the block waits for
    the compilers and raises what they raised. Kernels of the interpreter run as always.

    Args:
        threads: compilers at work at once; default the number of processors, at most 16.
    """
    launch = JITFunction.run
    compiling: dict[Any, Future[Any]] = {}
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    pool = ThreadPoolExecutor(
        threads or min(os.cpu_count() or 1, 16),
        initializer=torch.cuda.set_device if device is not None else None,
        initargs=(device,) if device is not None else (),
    )

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = (self, *map(_seen_by_compiler, args), *options.keys())
        key += tuple(map(_seen_by_compiler, options.values()))
        if key not in compiling:
            compiling[key] = pool.submit(launch, self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch
        pool.shutdown()
    for kernel in compiling.values():
        kernel.result()


def _seen_by_compiler(value: Any) -> Any:
    """What of an argument decides which machine code is made; plain values by themselves."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, len(value.shape), *value.block_shape
    return type(value), value
