"""Everything on the device that steps need beside weights and pools, at addresses that do not change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apar.plugins.gpu.fork_attention import ForkAttention
from apar.runtime.executor.cuda.step_buffers import Layout, StepBuffers


class StepMemory:
    """Buffers for every step whose layout is no larger than the largest of `layouts`.

    Attributes:
        buffers: index arrays.
        logits: float32 [wanted, vocab].
        hidden: [wanted, hidden_size], the states behind the last norm.
        workspace: of the attention kernels.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        attention: ForkAttention,
        *,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size, self._wanted, self._tokens, self._parts = (
            max(column) for column in zip(*map(_needs, layouts), strict=True)
        )
        self.buffers = StepBuffers(size, attention.block_size, device)
        self.logits = torch.zeros((self._wanted, vocab_size), dtype=torch.float32, device=device)
        self.hidden = torch.zeros((self._wanted, hidden_size), dtype=dtype, device=device)
        self.workspace = attention.workspace(self._tokens, self._parts, dtype)

    def holds(self, layout: Layout) -> bool:
        """Whether a step of this layout fits."""
        has = (self.buffers.size, self._wanted, self._tokens, self._parts)
        return all(need <= room for need, room in zip(_needs(layout), has, strict=True))


def _needs(layout: Layout) -> tuple[int, int, int, int]:
    return layout.size, layout.bucket.wanted, layout.bucket.tokens, layout.sizes.parts
