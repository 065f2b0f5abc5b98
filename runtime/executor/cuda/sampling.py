"""Sampling where the logits are: the rules of `apar.runtime.sampler` in PyTorch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apar.runtime.device_logits import BoolArray, DeviceLogits, Drawn
from apar.runtime.step import Float32Array, IntArray

_TOP_K = 1
"""Column of the rows' numbers."""
_CANDIDATES = 1024
"""Where every drawing row has a top-k of at most this, only so many logits are sorted."""


class TorchLogits(DeviceLogits):
    """`DeviceLogits` over a tensor float32 [L, vocab], which `draw` may overwrite."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = (values.shape[0], values.shape[1])

    @torch.inference_mode()
    def host(self, rows: IntArray | None = None) -> Float32Array:
        """See DeviceLogits.host."""
        values = self.values if rows is None else self.values[self._upload(rows)]
        # A copy even where the device is the CPU: the next step overwrites the buffer.
        copied: Float32Array = values.to("cpu", copy=True).numpy()
        return copied

    @torch.inference_mode()
    def take(self, rows: IntArray) -> TorchLogits:
        """See DeviceLogits.take."""
        return TorchLogits(self.values[self._upload(rows)])

    @torch.inference_mode()
    def draw(
        self,
        vocab_size: int,
        bans: list[tuple[int, BoolArray]],
        drawn: BoolArray,
        numbers: npt.NDArray[np.float64],
        uniforms: npt.NDArray[np.float64],
        watched: int | None = None,
    ) -> Drawn:
        """See DeviceLogits.draw. One wait for the device: for the tokens."""
        logits = self.values[:, :vocab_size]
        # Bans may overwrite a NaN or an infinity, so the largest is looked at before: NaN wins a maximum.
        sound = logits.amax(1) < torch.inf
        before = None if watched is None else logits[:, watched].clone()
        for token, banned in bans:
            if banned.all():
                logits[:, token] = -torch.inf
            elif banned.any():
                logits[self._upload(np.flatnonzero(banned)), token] = -torch.inf
        peaks, tokens = logits.max(1)
        good = sound & peaks.isfinite()
        # Where it was not banned, it is not above the largest.
        denied = torch.zeros_like(good) if before is None else before > peaks
        if drawn.any():
            rows = np.flatnonzero(drawn)
            part = logits if rows.size == drawn.size else logits[self._upload(rows)]
            top_k = numbers[rows, _TOP_K]
            few = bool(top_k.min() >= 1 and top_k.max() <= min(_CANDIDATES, vocab_size - 1))
            candidates = int(top_k.max()) if few else vocab_size
            picked = _pick(part, self._upload(numbers[rows]), self._upload(uniforms[rows]), candidates)
            if rows.size == drawn.size:
                tokens = picked
            else:
                tokens[self._upload(rows)] = picked
        result = torch.stack((tokens, good.to(tokens.dtype), denied.to(tokens.dtype))).cpu().numpy()
        return Drawn(result[0].astype(np.int32), result[1].astype(np.bool_), result[2].astype(np.bool_))

    def _upload(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.values.device, non_blocking=True)


def _pick(logits: Tensor, numbers: Tensor, uniforms: Tensor, candidates: int) -> Tensor:
    """Tokens [n] drawn from logits [n, V]: sorted by logit, ties by id; min-p, top-k, top-p; the row's number.

    candidates: how many of the largest logits can be drawn at all.
    """
    inverse, top_k, top_p, min_p = (numbers[:, i, None] for i in range(4))
    if candidates < logits.shape[1]:
        ids = _largest(logits, candidates)
        values = logits.gather(1, ids)
    else:
        values, ids = torch.sort(logits, dim=1, descending=True, stable=True)
    exact = values.double()
    weights = torch.exp((exact - exact[:, :1]) * inverse)
    # Weights descend, so whatever is kept is a front part.
    place = torch.arange(weights.shape[1], device=logits.device)
    kept = (weights > 0) & (weights >= min_p) & ((top_k == 0) | (place < top_k))
    sums = (weights * kept).cumsum(1)
    # A row of NaN keeps nothing; its token has no meaning and `draw` says so.
    count = kept.sum(1, keepdim=True).clamp_min(1)
    nucleus = 1 + (sums < top_p * sums[:, -1:]).sum(1, keepdim=True)
    width = torch.where(top_p < 1.0, torch.minimum(nucleus, count), count)
    chosen = (sums <= uniforms[:, None] * sums.gather(1, width - 1)).sum(1, keepdim=True)
    return ids.gather(1, torch.minimum(chosen, width - 1))[:, 0]


def _largest(logits: Tensor, count: int) -> Tensor:
    """Ids [n, count] of each row's largest logits, largest first, ties by id. Rows hold no NaN that matters."""
    # One 64-bit key: the float's bits in an order-preserving form, then the id downwards.
    bits = (logits + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered << 32) | (0xFFFFFFFF - ids)
    return 0xFFFFFFFF - (torch.topk(keys, count, dim=1).values & 0xFFFFFFFF)
