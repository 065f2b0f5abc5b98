"""Matrix products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, added):
    """a @ b + added in float32. The interpreter keeps bfloat16 as bare bits and would multiply those; float32 holds
    the same numbers, and their products, exactly."""
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), added, input_precision="ieee")
    else:
        result = tl.dot(a, b, added, input_precision="ieee")
    return result
