"""Live branches in arrays: one slot a branch, so that a step's work is a few NumPy calls and no loop."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.runtime.branch import Branch
from apar.runtime.kv_cache import KVCacheError
from apar.runtime.step import IntArray

NO_LIMIT = np.iinfo(np.int32).max
NOT_HERE, NEVER = -1, -2
"""`fork_limit` where a branch may not fork: by its request's `fork` or `max_depth`, by the server's policy."""


class BranchTable:
    """Structure of arrays over the slots of live branches.

    Args:
        capacity: slots, the most branches that can be alive in the server.
        max_context: longest path in tokens.
        block_size: slots of a KV block.
    """

    def __init__(self, capacity: int, max_context: int, block_size: int) -> None:
        self.capacity = capacity
        self.block_size = block_size
        width = -(-max_context // block_size)
        # np.empty: pages of paths that nobody wrote are never touched.
        self.tokens = np.empty((capacity, max_context + 2), dtype=np.int32)
        """Path tokens; `tokens[s, :length[s]]` is the whole path, prompt included."""
        self.block_table = np.full((capacity, width), -1, dtype=np.int32)
        self.length = np.zeros(capacity, dtype=np.int32)
        self.computed = np.zeros(capacity, dtype=np.int32)
        """How many leading tokens of the path have K/V in the listed blocks."""
        self.num_blocks = np.zeros(capacity, dtype=np.int32)
        self.copy_tail = np.zeros(capacity, dtype=np.int32)
        """1 where the last listed block is the parent's, partly filled: it is to be copied before use."""
        self.limit = np.zeros(capacity, dtype=np.int32)
        """Path length at which the branch has to end."""
        self.request = np.zeros(capacity, dtype=np.int64)
        self.fork_limit = np.zeros(capacity, dtype=np.int32)
        """Longest path after which the branch may still sample [Fork]; NOT_HERE or NEVER where it never may."""
        self.fork_levels = np.zeros(capacity, dtype=np.int32)
        """How many generations may descend from the branch."""
        self.start = np.zeros(capacity, dtype=np.int32)
        """Path position of the branch's first own token."""
        self.clock_base = np.zeros(capacity, dtype=np.int32)
        """`length - clock_base`: turns of plain decoding, in which all branches of a request sample together, that the
        path stands for."""
        self.generation = np.zeros(capacity, dtype=np.int64)
        """How many branches have ended in the slot."""
        self.share = np.full(capacity, NO_LIMIT, dtype=np.int32)
        """Leading blocks known to be the same as in the request's other branches."""
        self.first_step = np.zeros(capacity, dtype=np.int64)
        """Step in which the branch sampled its first token."""
        self.branches: npt.NDArray[np.object_] = np.full(capacity, None, dtype=object)
        """Who is in a slot; None in free ones."""
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that `take` can still give."""
        return len(self._free)

    def take(self, branch: Branch) -> int:
        """Give `branch` a slot without blocks; returns it. Its path is the caller's to write."""
        if not self._free:
            raise KVCacheError(f"all {self.capacity} branch slots are taken")
        branch.slot = slot = self._free.pop()
        self.branches[slot] = branch
        self.first_step[slot] = -1
        return slot

    def give_back(self, branch: Branch) -> None:
        """Free the branch's slot; its blocks must have been released."""
        slot = branch.slot
        self.branches[slot] = None
        self.generation[slot] += 1
        branch.slot = -1
        self._free.append(slot)

    def branches_at(self, slots: IntArray) -> list[Branch]:
        """The branches in `slots`, all of which are taken."""
        branches: list[Branch] = self.branches[slots].tolist()
        return branches

    def blocks(self, slot: int) -> npt.NDArray[np.int32]:
        """The blocks listed by a slot (a view)."""
        return self.block_table[slot, : self.num_blocks[slot]]
