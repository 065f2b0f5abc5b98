"""Bad words and penalties: rules that look at a row's path."""

from __future__ import annotations

import numpy as np

from apar.runtime.sampling.prepared_params import PreparedParams
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, Int32Array, IntArray


def ban_words(logits: Float32Array, prepared: PreparedParams, path: Int32Array) -> None:
    """Ban the tokens that would complete a bad word. logits: [V], path: [length]."""
    logits[prepared.bad_ids] = -np.inf
    if prepared.bad_lengths:
        tail = path[-prepared.bad_lengths[-1] :].tolist()
        for length in prepared.bad_lengths:
            if length <= len(tail):
                last = prepared.bad_endings.get(tuple(tail[-length:]))
                if last is not None:
                    logits[last] = -np.inf


def penalise(
    logits: Float32Array, params: SamplingParams, path: Int32Array, prompt_tokens: int, exempt: IntArray
) -> None:
    """Repetition, presence and frequency penalties on one row, leaving the logits of `exempt` ids as they are."""
    spared = logits[exempt]
    if params.repetition_penalty != 1.0:
        values = logits[path]
        # A token that stands twice in the path gets the same value twice, not the penalty twice.
        logits[path] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        ids, counts = np.unique(path[prompt_tokens:], return_counts=True)
        logits[ids] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
    logits[exempt] = spared
