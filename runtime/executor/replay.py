"""Executor without a model: replays recorded paragraph trees and audits the K/V books while doing so.

Where a model keeps keys and values, this pool keeps one small record per slot: the script state after the
slot's token (see `replay_script`), the token, its position and a running hash of the path. A token's record
is derived from the record of its predecessor, which is found through the block table like any key. So a wrong
table, a forgotten slot copy, or a write into another branch's block breaks the script, and the step raises
ExecutorError instead of returning plausible tokens.

Accounting. A recorded answer's `sum(main + detail)` counts text tokens only. Decoded with all its forks, the
request samples `sum(main + detail) + F` [Fork]s and `F + 1` EOS, F = segments with a detail; the F forced
[Child]s are not sampled. Where the runtime bans a [Fork], that detail comes inline (second-highest logit), the
text tokens stay the same, and neither [Fork] nor the child's EOS is sampled for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.export.manifest import DecoderConfig, Manifest, TokenIds
from apar.runtime.executor.base import Executor
from apar.runtime.executor.check import check_swaps
from apar.runtime.executor.recorded_trees import Tree
from apar.runtime.executor.replay_script import BOS, CHILD, EMPTY, EOS, FORK, OFF, PAD, Script
from apar.runtime.executor.tree_mask import parents
from apar.runtime.step import Float32Array, Int32Array, StepInputs

IndexArray = npt.NDArray[np.int64]

FIRST_LOGIT, SECOND_LOGIT = 200.0, 100.0
"""Far enough apart that sampling at ordinary temperatures is greedy."""


class ReplayExecutor(Executor):
    """Emits recorded trees' tokens. Logits are FIRST_LOGIT, SECOND_LOGIT (only before a [Fork]) and 0."""

    name = "replay"

    def __init__(
        self,
        trees: Sequence[Tree],
        *,
        num_blocks: int = 4096,
        host_blocks: int = 0,
        block_size: int = 16,
        vocab_size: int = 64,
        max_context: int = 4096,
        verify_paths: bool = False,
        step_seconds: float = 0.0,
    ) -> None:
        """Prepare to replay `trees` (`{"prompt_tokens": int, "segments": [[main, detail], ...]}`).

        host_blocks: blocks that steps can swap out to.
        verify_paths: check every slot of every row's path at each step (about 10 ns a slot), not only the
            predecessors of the step's tokens.
        step_seconds: least duration of a step, to stand in for a model's.
        Raises ExecutorError if a tree or an option is malformed.
        """
        if num_blocks < 1 or block_size < 1:
            raise ExecutorError(f"the pool needs at least one block of one slot, not {num_blocks} of {block_size}")
        if host_blocks < 0:
            raise ExecutorError(f"host_blocks must be at least 0, not {host_blocks}")
        self._script = Script(trees, vocab_size)
        self._verify_paths = verify_paths
        self._step_seconds = step_seconds
        self.num_blocks = num_blocks
        self.host_blocks = host_blocks
        self.manifest = Manifest(
            decoder=DecoderConfig(
                vocab_size=vocab_size,
                hidden_size=2,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                head_dim=2,
                intermediate_size=2,
                rms_norm_eps=1e-6,
                max_context=max_context,
                rope_inv_freq=(1.0,),
            ),
            tokens=TokenIds(fork=FORK, child=CHILD, eos=(EOS,), bos=BOS, pad=PAD),
            block_size=block_size,
            source="replay",
        )
        slots = num_blocks * block_size
        self.detail = f"replay of {len(trees)} recorded trees, {num_blocks} blocks of {block_size} slots"
        self._state = np.zeros(slots, np.int32)
        self._token = np.zeros(slots, np.int32)
        self._position = np.zeros(slots, np.int32)
        self._hash = np.zeros(slots, np.uint64)
        self._owner = np.zeros(slots, np.int32)
        # Of every record, the part that host blocks hold.
        self._host = [np.zeros((host_blocks, block_size), pool.dtype) for pool in self._records()]
        self._logits = np.zeros((64, vocab_size), np.float32)
        self._steps = 0
        self._closed = False

    def replay_prompt(self, tree_index: int, salt: int = 0) -> list[int]:
        """Prompt of a tree, exactly its `prompt_tokens` ids; `salt` varies the filler after the index."""
        return self._script.prompt(tree_index, salt)

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute. Raises ExecutorError where the step contradicts the pool's contents."""
        if self._closed:
            raise ExecutorError("the replay executor is closed")
        started = time.perf_counter() if self._step_seconds else 0.0
        swaps = inputs.swap_out.size or inputs.swap_in.size
        if swaps:
            check_swaps(inputs, num_blocks=self.num_blocks, host_blocks=self.host_blocks)
            self._swap(inputs.swap_out, outward=True)
        self._copy_slots(inputs.slot_copies)
        if swaps:
            self._swap(inputs.swap_in, outward=False)
        count = np.diff(inputs.query_start)
        first_index = inputs.kv_len - count
        real = inputs.slot_mapping >= 0
        if count.size and int(count.min()) < 1:
            raise ExecutorError("a row of the step has no tokens")
        row = np.repeat(np.arange(count.size), count)
        offset = np.arange(row.size) - inputs.query_start[:-1][row]
        self._check_slots(inputs, row, first_index[row] + offset, real)
        state = self._advance(inputs, count, first_index, real, row, offset)
        if self._verify_paths:
            self._check_paths(inputs, first_index, real)
        logits = self._emit(state[inputs.logits_rows])
        if self._step_seconds:
            time.sleep(max(0.0, started + self._step_seconds - time.perf_counter()))
        return logits

    def close(self) -> None:
        """Free the pool. Idempotent."""
        self._closed = True
        empty = np.zeros(0, np.int32)
        self._state = self._token = self._position = self._owner = empty
        self._hash = np.zeros(0, np.uint64)
        self._host.clear()

    def _records(self) -> tuple[npt.NDArray[Any], ...]:
        """What a slot holds: state, token, position, hash of the path."""
        return self._state, self._token, self._position, self._hash

    def _swap(self, pairs: Int32Array, outward: bool) -> None:
        source, target = pairs[:, 0], pairs[:, 1]
        for pool, host in zip(self._records(), self._host, strict=True):
            blocks = pool.reshape(self.num_blocks, -1)
            if outward:
                host[target] = blocks[source]
            else:
                blocks[target] = host[source]

    def _copy_slots(self, copies: Int32Array) -> None:
        if not copies.size:
            return
        if int(copies.min()) < 0 or int(copies.max()) >= self._state.size:
            raise ExecutorError(f"slot_copies name slots outside 0..{self._state.size - 1}")
        source, target = copies[:, 0], copies[:, 1]
        if np.unique(target).size != target.size:
            raise ExecutorError("slot_copies write a slot twice")
        for pool in self._records():
            pool[target] = pool[source]

    def _check_slots(self, inputs: StepInputs, row: IndexArray, index: IndexArray, real: npt.NDArray[np.bool_]) -> None:
        """Every token must be written where the row's table will look for it, and no slot twice."""
        size = self.manifest.block_size
        if inputs.block_table.shape[1] * size < int(inputs.kv_len.max(initial=0)):
            raise ExecutorError("block_table is narrower than the longest row")
        expected = inputs.block_table[row, index // size] * size + index % size
        wrong = real & ((expected != inputs.slot_mapping) | (inputs.slot_mapping >= self._state.size))
        if wrong.any():
            at = int(wrong.argmax())
            raise ExecutorError(
                f"row {row[at]}, path index {index[at]}: slot_mapping says slot {inputs.slot_mapping[at]}, "
                f"block_table says {expected[at]} (the pool has {self._state.size} slots)"
            )
        written = inputs.slot_mapping[real]
        order = np.arange(written.size, dtype=np.int32)
        self._owner[written] = order
        if not np.array_equal(self._owner[written], order):
            raise ExecutorError("two tokens of the step write the same slot")

    def _advance(
        self,
        inputs: StepInputs,
        count: Int32Array,
        first_index: Int32Array,
        real: npt.NDArray[np.bool_],
        row: IndexArray,
        offset: IndexArray,
    ) -> Int32Array:
        """Write the records of all tokens and return their states, [T]."""
        size = self.manifest.block_size
        begin = inputs.query_start[:-1]
        live = real[begin]
        before = np.maximum(first_index - 1, 0)
        previous = inputs.block_table[np.arange(count.size), before // size] * size + before % size
        bad = live & (first_index > 0) & ((previous < 0) | (previous >= self._state.size))
        if bad.any():
            raise ExecutorError(f"row {int(bad.argmax())}: no block for path index {before[bad][0]} in block_table")
        previous[first_index <= 0] = -1
        state = np.full(row.size, OFF, np.int32)
        rows = np.flatnonzero(live)
        # All K/V of a step is written before any is read: a row may go on from a slot that another row of the
        # same step writes. Mark what is still to be written and take such rows in later rounds.
        self._steps += 1
        self._owner[inputs.slot_mapping[real]] = -self._steps
        while rows.size:
            waits = (previous[rows] >= 0) & (self._owner[previous[rows]] == -self._steps)
            ready = rows if not waits.any() else rows[~waits]
            if not ready.size:
                raise ExecutorError(f"rows {rows[:8].tolist()} wait for each other's tokens")
            self._advance_rows(inputs, ready, previous, state, count, row, offset)
            rows = rows[waits]
        return state

    def _advance_rows(
        self,
        inputs: StepInputs,
        rows: IndexArray,
        previous: Int32Array,
        state: Int32Array,
        count: Int32Array,
        row: IndexArray,
        offset: IndexArray,
    ) -> None:
        """Write the records of `rows`, whose predecessors' records are in the pool."""
        slot = previous[rows]
        fresh = slot < 0
        origin = np.where(fresh, self._script.start, self._state[slot])
        position = np.where(fresh, -1, self._position[slot])
        path_hash = np.where(fresh, np.uint64(0), self._hash[slot])
        start = inputs.kv_len[rows] - count[rows]
        broken = (origin == EMPTY) | (position != start - 1)
        if broken.any():
            at = int(broken.argmax())
            found = "nothing" if origin[at] == EMPTY else f"a token of position {position[at]}"
            raise ExecutorError(
                f"row {rows[at]}: slot {slot[at]} should hold path index {start[at] - 1} of the row, it holds {found}"
            )
        token = inputs.input_ids
        mix = _mix(token, inputs.position_ids)
        plain_decode = rows.size == row.size  # every row is here and has one token: by far the commonest step
        if plain_decode:
            flat = local = rows
        else:
            chosen = np.zeros(count.size, bool)
            chosen[rows] = True
            flat = np.flatnonzero(chosen[row] & (inputs.slot_mapping >= 0))
            local = np.cumsum(chosen)[row[flat]] - 1  # index of each token's row in `rows`
        if plain_decode:
            state[:] = self._script.next(origin, token)
            hashes, depth = path_hash + mix, start
        elif inputs.tree_mask.shape[1]:
            parent = parents(inputs.tree_mask, inputs.query_start, row, offset, flat)
            hashes = np.zeros(row.size, np.uint64)
            depth = np.zeros(row.size, np.int32)
            for level in range(int(offset[flat].max()) + 1):
                at = offset[flat] == level
                token_at, local_at, above = flat[at], local[at], parent[flat[at]]
                inner = above >= 0
                state[token_at] = self._script.next(np.where(inner, state[above], origin[local_at]), token[token_at])
                hashes[token_at] = np.where(inner, hashes[above], path_hash[local_at]) + mix[token_at]
                depth[token_at] = np.where(inner, depth[above], position[local_at]) + 1
        else:
            self._script.walk(token, inputs.query_start, rows, origin, count, state)
            total = np.cumsum(mix, dtype=np.uint64)
            begin = inputs.query_start[rows]
            hashes = total + np.repeat(_scatter(path_hash - total[begin] + mix[begin], rows, count.size), count)
            depth = offset + np.repeat(inputs.kv_len - count, count)
        wrong = depth[flat] != inputs.position_ids[flat]
        if wrong.any():
            at = int(flat[wrong.argmax()])
            said = inputs.position_ids[at]
            raise ExecutorError(f"row {row[at]}: position_ids says {said}, the path says {depth[at]}")
        # A draft may be wrong; what a row starts with, and a prompt, may not.
        sure = (offset[flat] == 0) | fresh[local]
        lost = sure & (state[flat] == OFF)
        if lost.any():
            at = int(flat[lost.argmax()])
            raise ExecutorError(
                f"row {row[at]}: token {token[at]} at position {inputs.position_ids[at]} follows no recorded tree: "
                "the prompt is not from replay_prompt(), another token was chosen, or the row's K/V is another's"
            )
        target = inputs.slot_mapping[flat]
        self._state[target] = state[flat]
        self._token[target] = token[flat]
        self._position[target] = inputs.position_ids[flat]
        self._hash[target] = hashes[flat]
        self._owner[target] = 0

    def _check_paths(self, inputs: StepInputs, first_index: Int32Array, real: npt.NDArray[np.bool_]) -> None:
        """Every slot below the step's own tokens must continue the hash of the slot before it."""
        size = self.manifest.block_size
        length = np.where(real[inputs.query_start[:-1]], first_index, 0)
        row = np.repeat(np.arange(length.size), length)
        index = np.arange(row.size) - (np.cumsum(length) - length)[row]
        block = inputs.block_table[row, index // size]
        outside = (block < 0) | (block >= self.num_blocks)
        slot = np.where(outside, 0, block * size + index % size)
        here = self._hash[slot]
        before = np.where(index > 0, np.roll(here, 1), np.uint64(0))
        wrong = outside | (self._state[slot] == EMPTY) | (here != before + _mix(self._token[slot], index))
        if wrong.any():
            at = int(wrong.argmax())
            raise ExecutorError(
                f"row {row[at]}: block {block[at]} does not hold path index {index[at]} of the row "
                "(freed too early, overwritten by another branch, or never copied)"
            )

    def _emit(self, state: Int32Array) -> Float32Array:
        wanted = state.size
        if wanted > self._logits.shape[0]:
            self._logits = np.zeros((max(wanted, 2 * self._logits.shape[0]), self._logits.shape[1]), np.float32)
        logits = self._logits[:wanted]
        logits.fill(0.0)
        index = np.arange(wanted)
        second = self._script.second_token[state]
        logits[index, np.maximum(second, PAD)] = SECOND_LOGIT
        logits[:, PAD] = 0.0
        logits[index, np.maximum(self._script.first_token[state], PAD)] = FIRST_LOGIT
        return logits


def _mix(token: npt.NDArray[np.integer], position: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of (token, position), elementwise; sums of them identify a path."""
    value = token.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    value += position.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(0x165667B19E3779F9)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(29)
    return value


def _scatter(values: npt.NDArray[np.uint64], index: IndexArray, size: int) -> npt.NDArray[np.uint64]:
    out = np.zeros(size, np.uint64)
    out[index] = values
    return out
