"""Lets a kernel start while the one before it still runs (programmatic dependent launch).

What a kernel reads before `wait_for_previous` must not be written by the kernel before it. The next
kernel is let in behind the wait, so never more than two run at a time.

A kernel that calls `begin_next` at its beginning lets the next one in at once, so that several wait
for one another. What they read before `wait_for_all` must not be written by any of them: a kernel
that is launched in the usual way, without overlap, ends such a chain.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Go on when the kernel before has finished, and let the next one begin."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin_next(OVERLAP: tl.constexpr):
    """Let the next kernel begin as soon as all programs of this one have begun."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_all(OVERLAP: tl.constexpr):
    """Go on when the kernels before have finished."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
