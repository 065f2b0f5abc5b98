"""ForkAttention on GPUs, in the Triton kernel language. docs/gpu.md is the guide, `fork_attention` the door.

The same source runs in Triton's CPU interpreter (TRITON_INTERPRET=1, set before the first import), is compiled
just in time under PyTorch, and ahead of time into the launch table that the TensorRT plugin carries (`pack`).
"""

import os

# Fused multiply-adds, as compilers do by default; Triton from 3.9 on wants to be told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
