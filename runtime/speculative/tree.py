"""The tree of draft nodes that may follow a row's last token: built once, used by every row of every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apar.runtime.step import Float32Array, Int32Array, IntArray

_BITS = 32


def rank_share(rank: int) -> float:
    """How often the token that comes is the guess of this rank, if it is among the guesses at all.

    A prior, about what Medusa reports for its heads on chat; it orders the nodes, it decides no token.
    """
    return 0.7 if rank == 0 else 0.12 * rank**-1.2


class DraftTree:
    """Nodes in an order whose every prefix is a tree too, so that a smaller draft is a prefix of the largest.

    The order is by expected gain: the product of `rank_share` along the path, parents first.

    Args:
        paths: every node as its path of ranks from the row's last token; a node's ancestors must be among them.
        most: keep no more than so many nodes.
    """

    def __init__(self, paths: Sequence[tuple[int, ...]], most: int | None = None) -> None:
        gain = {path: float(np.prod([rank_share(rank) for rank in path])) for path in paths}
        order = sorted(paths, key=lambda path: (-gain[path], len(path), path))[:most]
        place = {path: index for index, path in enumerate(order)}
        self.size = len(order)
        self.parent: IntArray = np.array([place[path[:-1]] if len(path) > 1 else -1 for path in order], np.int64)
        """[N] the node before; -1: the row's last token."""
        self.depth: Int32Array = np.array([len(path) for path in order], np.int32)
        """[N] from 1; node of depth d is guessed by head d - 1."""
        self.rank: IntArray = np.array([path[-1] for path in order], np.int64)
        """[N] which of its head's guesses, 0 is the likeliest."""
        self.share: Float32Array = np.array([gain[path] for path in order], np.float32)
        """[N] product of `rank_share` along the path."""
        self.max_depth = int(self.depth.max())
        self.max_rank = int(self.rank.max())
        in_line = (self.parent == np.arange(self.size) - 1) & (self.rank == 0)
        self.chain = self.size if in_line.all() else int(in_line.argmin())
        """How many of the first nodes are a chain of single guesses."""
        self.linear = self.chain == self.size
        """All of them are: causal order is the mask."""
        deeper = [np.flatnonzero(self.depth > depth) for depth in range(self.max_depth + 1)]
        self.upto_depth: Int32Array = np.array([d[0] if d.size else self.size for d in deeper], np.int32)
        """[max_depth + 1] length of the longest prefix without a node below that depth."""
        wider = [np.flatnonzero(self.rank >= ranks) for ranks in range(self.max_rank + 2)]
        self.upto_rank: Int32Array = np.array([w[0] if w.size else self.size for w in wider], np.int32)
        """[max_rank + 2] length of the longest prefix that needs no more guesses of a head than so many."""
        self._masks: dict[int, Int32Array] = {}

    def masks(self, pending: int) -> Int32Array:
        """Rows of `tree_mask` [N, W] of the nodes behind `pending` tokens of the row that all of them see."""
        if pending not in self._masks:
            visible = np.zeros((self.size, pending + self.size), dtype=bool)
            visible[:, :pending] = True
            for node, parent in enumerate(self.parent.tolist()):
                if parent >= 0:
                    visible[node] = visible[parent]
                visible[node, pending + node] = True
            self._masks[pending] = _words(visible)
        return self._masks[pending]


def causal_masks(offsets: Int32Array, words: int) -> Int32Array:
    """Rows of `tree_mask` [T, W] of tokens that see their row's tokens up to themselves; offsets: [T] in their rows."""
    bits = np.clip(offsets[:, None] + 1 - _BITS * np.arange(words), 0, _BITS).astype(np.uint64)
    ones = (np.uint64(1) << bits) - np.uint64(1)
    masks: Int32Array = ones.astype(np.uint32).view(np.int32)
    return masks


def _words(visible: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> Int32Array:
    """Pack bool [n, m] into int32 words [n, ceil(m / 32)], bit j % 32 of word j // 32."""
    count = -(-visible.shape[1] // _BITS) * _BITS
    padded = np.zeros((visible.shape[0], count), dtype=bool)
    padded[:, : visible.shape[1]] = visible
    packed: Int32Array = np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)
    return packed
