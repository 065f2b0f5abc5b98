"""Runs: what rows say along their drafts where nothing can happen but that it is said.

Most tokens of a draft neither fork nor end a branch, and where a row takes the largest logit and no limit is near, no
rule has a say in them. Such tokens are found for all rows at once and booked together, instead of round by round. A run
ends before the first token with consequences; from there the row samples as in any round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.speculative.verification import Verification
from apar.runtime.step import Float32Array, Int32Array, IntArray


@dataclass(slots=True)
class Runs:
    """Of one step: rows are places among those that sample, nodes are places among the draft tokens."""

    rows: IntArray
    """[n] rows that say something in a run."""
    counts: Int32Array
    """[n] how many tokens each."""
    tokens: Int32Array
    """[sum of counts] the tokens, row after row."""
    accepted: IntArray
    """[n] how many of these were draft nodes."""
    nodes: IntArray
    """[sum of accepted] which ones."""
    going: IntArray
    """[m] rows that have to sample, behind their runs or from the start; the others are done."""


def find_runs(
    verification: Verification, logits: Float32Array, tokens: TokenIds, room: Int32Array, vocab_size: int
) -> Runs:
    """Follow all rows through their drafts.

    Args:
        verification: of the step, nothing of which is booked yet.
        logits: [L, V] of the rows, then of the draft nodes.
        tokens: ids of [Fork], [Child] and the ends.
        room: [S] most tokens that a row may say in a run; 0: it samples from the start.
        vocab_size: tokens that may come out.
    """
    logits = logits[:, :vocab_size]
    best = logits.argmax(axis=1)
    # NaN wins an argmax, and the sampler fails rows whose control tokens are infinite.
    plain = np.isfinite(logits[np.arange(best.size), best])
    for token in (tokens.fork, tokens.child):
        plain &= (best != token) & (logits[:, token] < np.inf)
    for token in tokens.eos:
        plain &= best != token
    said, quiet = best.tolist(), plain.tolist()
    behind = verification.behind()
    count = room.size
    rows: list[int] = []
    counts: list[int] = []
    words: list[int] = []
    accepted: list[int] = []
    nodes: list[int] = []
    going: list[int] = []
    for row, most in enumerate(room.tolist()):
        place, node, length, before = row, -1, 0, len(nodes)
        while length < most and quiet[place]:
            token = said[place]
            words.append(token)
            length += 1
            hit = behind.get((row, node, token))
            if hit is None:
                break
            nodes.append(hit[0])
            place, node = count + hit[0], hit[1]
        else:
            going.append(row)
        if length:
            rows.append(row)
            counts.append(length)
            accepted.append(len(nodes) - before)
    return Runs(
        np.array(rows, np.int64),
        np.array(counts, np.int32),
        np.array(words, np.int32),
        np.array(accepted, np.int64),
        np.array(nodes, np.int64),
        np.array(going, np.int64),
    )
