"""Lets a kernel start while the one before it still runs (programmatic dependent launch).

What a kernel reads before `wait_for_previous` must not be written by the kernel before it. The next
kernel is let in behind the wait, so never more than two run at a time.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Go on when the kernel before has finished, and let the next one begin."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
