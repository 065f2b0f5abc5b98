"""Typical acceptance (Medusa, arXiv 2401.10774): drafts that the model finds typical are taken as they are.

Which tokens come out then depends on the drafts, so it is another distribution than that of plain sampling. Rows that
take the largest logit are not concerned.
"""

from __future__ import annotations

import numpy as np

from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, Int32Array


def typical_token(
    logits: Float32Array, guesses: Int32Array, params: SamplingParams, threshold: float, alpha: float
) -> int | None:
    """The likeliest of `guesses` that is typical; None: none is, so that the row's own draw stands.

    A guess is typical if its probability is above min(threshold, alpha * exp(-entropy)), at the row's temperature.
    It must also be among the tokens that top-k, top-p and min-p leave.

    Args:
        logits: [V] of the row, bans and biases applied.
        guesses: draft tokens that may come here.
        params: of the row's request.
    """
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    chances = weights / weights.sum()
    positive = chances[chances > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    guess = int(guesses[chances[guesses].argmax()])
    chance = chances[guess]
    if chance <= min(threshold, alpha * np.exp(-entropy)):
        return None
    likelier = chances > chance
    if params.top_k > 0 and np.count_nonzero(likelier) >= params.top_k:
        return None
    if chance < params.min_p * chances.max() or (params.top_p < 1.0 and chances[likelier].sum() >= params.top_p):
        return None
    return guess
