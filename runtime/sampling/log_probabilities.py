"""Log-probabilities of rows, from their logits as they came."""

from __future__ import annotations

import numpy as np

from apar.runtime.outputs import Logprob
from apar.runtime.sampling.arrays import chunk_rows
from apar.runtime.sampling.drawing import totals
from apar.runtime.sampling.largest import largest
from apar.runtime.step import Float32Array, Int32Array


def log_probabilities(logits: Float32Array, tokens: Int32Array, asked: list[int]) -> list[Logprob]:
    """Of each row [n, V] the sampled token's, and those of the `asked` likeliest, largest first, ties by id."""
    found: list[Logprob] = []
    size = chunk_rows(logits.shape[1])
    for start in range(0, len(logits), size):
        values, most = logits[start : start + size], asked[start : start + size]
        peaks = values.max(axis=1)
        normaliser = peaks + np.log(totals(values, peaks, np.ones(len(values))))
        ids = largest(values, max(most)) if max(most) else None
        for i, token in enumerate(tokens[start : start + size].tolist()):
            entry = Logprob(token, float(values[i, token] - normaliser[i]))
            if ids is not None:
                best = ids[i, : most[i]]
                entry.top = list(zip(best.tolist(), (values[i, best] - normaliser[i]).tolist(), strict=True))
            found.append(entry)
    return found
