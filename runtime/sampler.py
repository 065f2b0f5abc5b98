"""From logits to tokens: bans, penalties, sampling; NumPy, for executors whose logits are in host memory.

Rules act on a row in this order:

1. Log-probabilities, where the request asks for them, are taken from the logits as they came.
2. Bans (the logit becomes -inf): [Child] always; [Fork] where the scheduler says so; end-of-sequence under
   `ignore_eos`; end-of-sequence and stop tokens in a root branch shorter than `min_tokens`; the last token of a bad
   word whose other tokens end the path (the prompt counts as path, so a word begun there is caught too).
3. `logit_bias` is added. It is finite, so no bias lifts a ban.
4. `repetition_penalty` over the tokens of the path, prompt included (CTRL, arXiv 1909.05858, as in the field's
   libraries: positive logits are divided, others multiplied); then `presence_penalty` and `frequency_penalty` over
   the generated part of the path (the rule of OpenAI's API). The generated part of a child includes what its
   ancestors generated before the fork. [Fork], [Child] and end-of-sequence are exempt from all three: otherwise each
   fork would make the next less likely, and a child (whose path holds a [Fork] by nature) would be penalised for it.
5. Greedy rows take the largest logit, ties to the lowest id. Others divide by `temperature`, then keep a front part
   of the tokens sorted by logit, largest first, ties by id: those with probability >= `min_p` times the largest; the
   first `top_k` of these; then the shortest front part whose share of the probability left is >= `top_p` (the order
   min-p, top-k, top-p is vLLM's). The row's random number (`random_stream`) picks from the cumulative
   distribution of that part.

Sorting before the pick makes the result a function of the row alone: no other row, no padding of the batch and no
internal chunk or candidate count changes it. A row whose logits cannot be sampled from (NaN, infinite, or
everything banned) is reported in `SampleResult.failed`; the other rows are unaffected.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from apar.export.errors import ExecutorError
from apar.export.manifest import TokenIds
from apar.runtime import random_stream
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.outputs import Logprob
from apar.runtime.sampling.arrays import BoolArray
from apar.runtime.sampling.drawing import draw
from apar.runtime.sampling.log_probabilities import log_probabilities
from apar.runtime.sampling.prepared_params import (
    BAD_WORDS,
    BIAS,
    LOGPROBS,
    MIN_TOKENS,
    NO_EOS,
    PENALTIES,
    RANDOM,
    PreparedParams,
)
from apar.runtime.sampling.token_rules import ban_words, penalise
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, Int32Array, IntArray

FAILED_TOKEN = -1
"""Stands in `SampleResult.tokens` where a row failed."""
_NO_ROWS: tuple[int, ...] = ()


@dataclass(slots=True)
class SampleResult:
    """What one call of `Sampler.sample` gives."""

    tokens: Int32Array
    """[L] sampled token ids; FAILED_TOKEN where the row failed."""
    logprobs: dict[int, Logprob] = field(default_factory=dict)
    """Row -> log-probabilities, for rows that asked and did not fail."""
    failed: tuple[int, ...] = _NO_ROWS
    """Rows, ascending, whose logits are NaN or infinite or whose every token is banned: only they are to fail."""
    denied: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Rows, ascending, in which [Fork] was banned and would otherwise have been the likeliest token."""


class Sampler:
    """Samples one token for each row of a step.

    State lives in arrays indexed by a branch's slot (0..capacity-1), which the scheduler assigns. Not thread-safe.
    """

    def __init__(self, vocab_size: int, tokens: TokenIds, capacity: int) -> None:
        """vocab_size: tokens that may come out; further columns of the logits (a padded vocabulary) are ignored."""
        self.vocab_size = vocab_size
        self.tokens = tokens
        self.capacity = capacity
        self._exempt = np.array(sorted({tokens.fork, tokens.child, *tokens.eos}), dtype=np.int64)
        self._flags = np.zeros(capacity, dtype=np.int32)
        self._keys = np.zeros(capacity, dtype=np.uint64)
        self._prompt_tokens = np.zeros(capacity, dtype=np.int32)
        self._min_tokens = np.zeros(capacity, dtype=np.int32)
        self._numbers = np.zeros((capacity, 4), dtype=np.float64)
        self._prepared: list[PreparedParams | None] = [None] * capacity

    def prepare(self, params: SamplingParams) -> PreparedParams:
        """Check a request's parameters against the vocabulary and convert them. Raises RequestError.

        `bad_words` must have been resolved (`SamplingParams.with_bad_words`); only `bad_words_ids` count here.
        """
        return PreparedParams.of(params, self.vocab_size, self.tokens)

    def attach(self, slot: int, prepared: PreparedParams, key: int, prompt_tokens: int, *, root: bool = True) -> None:
        """Give a slot to a branch.

        key: the branch's `random_stream` key. prompt_tokens: length of the request's prompt, for children too.
        root: whether this is the request's root branch, the only one that `min_tokens` binds.
        """
        minimum = prepared.params.min_tokens if root else 0
        self._flags[slot] = prepared.flags if minimum else prepared.flags & ~MIN_TOKENS
        self._keys[slot] = key
        self._prompt_tokens[slot] = prompt_tokens
        self._min_tokens[slot] = minimum
        self._numbers[slot] = prepared.numbers
        self._prepared[slot] = prepared

    def inherit(self, child: int, parent: int, key: int) -> None:
        """Give slot `child` to a branch of the request in slot `parent`; `key` as in `attach`."""
        self._flags[child] = self._flags[parent] & ~MIN_TOKENS
        self._keys[child] = key
        self._prompt_tokens[child] = self._prompt_tokens[parent]
        self._min_tokens[child] = 0
        self._numbers[child] = self._numbers[parent]
        self._prepared[child] = self._prepared[parent]

    def detach(self, slot: int) -> None:
        """Take a slot from its branch. Idempotent."""
        self._flags[slot] = 0
        self._prepared[slot] = None

    def is_greedy(self, slots: Int32Array | IntArray) -> BoolArray:
        """bool [L]: rows that take the largest logit instead of drawing."""
        return (self._flags[slots] & RANDOM) == 0

    def is_bare(self, slots: Int32Array | IntArray) -> BoolArray:
        """bool [L]: rows that take the largest logit and have no rules but the bans of control tokens."""
        return self._flags[slots] == 0

    def sample(
        self,
        logits: Float32Array | DeviceLogits,
        slots: Int32Array | IntArray,
        paths: Int32Array,
        lengths: Int32Array,
        counters: Int32Array,
        fork_banned: BoolArray,
    ) -> SampleResult:
        """Sample one token for each of L rows.

        logits: [L, V], V >= vocab_size, on the host or on a device; may be overwritten.
        slots: [L] slot of each row's branch.
        paths: [capacity, max_context] token ids; a slot's path is `paths[slot, :lengths[slot]]`, prompt first.
        lengths: [capacity] path lengths, without the token to be sampled.
        counters: [L] index in its own branch of the token to be sampled (a forced [Child] not counted).
        fork_banned: [L] whether [Fork] is banned in the row.

        Raises ExecutorError if the logits have the wrong shape or type.
        """
        if isinstance(logits, DeviceLogits):
            return self._sample_on_device(logits, slots, paths, lengths, counters, fork_banned)
        return self._sample_on_host(logits, slots, paths, lengths, counters, fork_banned)

    def _sample_on_host(
        self,
        logits: Float32Array,
        slots: Int32Array | IntArray,
        paths: Int32Array,
        lengths: Int32Array,
        counters: Int32Array,
        fork_banned: BoolArray,
    ) -> SampleResult:
        """As `sample`, in NumPy."""
        rows = len(slots)
        if logits.shape[0] != rows or logits.shape[1] < self.vocab_size or logits.dtype != np.float32:
            raise ExecutorError(
                f"logits have shape {logits.shape} and type {logits.dtype}, "
                f"wanted are float32 and {rows} rows of at least {self.vocab_size}: the engine belies its manifest"
            )
        if not logits.flags.writeable:
            logits = logits.copy()
        if logits.shape[1] > self.vocab_size:
            logits = logits[:, : self.vocab_size]
        tokens = self.tokens
        flags = self._flags[slots]
        needs = int(np.bitwise_or.reduce(flags))

        wanting: IntArray | None = None
        if needs & LOGPROBS:
            wanting = np.flatnonzero(flags & LOGPROBS)
            raw = logits[wanting]
        # Bans may overwrite a NaN or an infinity, so what they overwrite is looked at before.
        forking = logits[:, tokens.fork].copy()
        sound = (logits[:, tokens.child] < np.inf) & (forking < np.inf)
        if needs & (MIN_TOKENS | BAD_WORDS):
            sound &= logits.max(axis=1) < np.inf
        elif needs & NO_EOS:
            for token in tokens.eos:
                sound &= logits[:, token] < np.inf
        logits[:, tokens.child] = -np.inf
        logits[fork_banned, tokens.fork] = -np.inf
        if needs & ~(RANDOM | LOGPROBS):
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
                self._apply_rules(logits, needs, flags, slots, paths, lengths, counters)

        best = logits.argmax(axis=1)
        # argmax stops at the first NaN, so the value found is NaN exactly if the row holds one.
        peaks = logits[np.arange(rows), best]
        good = np.isfinite(peaks) & sound
        result = SampleResult(best.astype(np.int32))
        result.denied = np.flatnonzero(fork_banned & good & (forking > peaks))
        if not good.all():
            failed = np.flatnonzero(~good)
            result.tokens[failed] = FAILED_TOKEN
            result.failed = tuple(failed.tolist())
        if needs & RANDOM:
            drawing = np.flatnonzero((flags & RANDOM).astype(np.bool_) & good)
            self._draw(logits, drawing, slots, counters, peaks, result.tokens)
        if wanting is not None:
            self._report(raw, wanting, slots, good, result)
        return result

    def _sample_on_device(
        self,
        logits: DeviceLogits,
        slots: Int32Array | IntArray,
        paths: Int32Array,
        lengths: Int32Array,
        counters: Int32Array,
        fork_banned: BoolArray,
    ) -> SampleResult:
        """As `sample`. Rows with rules beyond bans of control tokens and drawing are brought to the host."""
        rows = len(slots)
        if logits.shape[0] != rows or logits.shape[1] < self.vocab_size:
            raise ExecutorError(
                f"logits have shape {logits.shape}, wanted are {rows} rows of at least {self.vocab_size}: "
                "the engine belies its manifest"
            )
        flags = self._flags[slots]
        hard = np.flatnonzero(flags & ~(RANDOM | NO_EOS))
        # Before `draw`, which may overwrite them.
        fetched = logits.host(hard) if hard.size else None
        result = SampleResult(np.empty(rows, np.int32))
        denied = np.zeros(rows, np.bool_)
        if hard.size < rows:
            drawn = (flags & RANDOM).astype(np.bool_)
            drawn[hard] = False
            no_eos = (flags & NO_EOS).astype(np.bool_)
            bans = [(self.tokens.child, np.ones(rows, np.bool_)), (self.tokens.fork, fork_banned)]
            bans += [(token, no_eos) for token in self.tokens.eos if no_eos.any()]
            uniforms = random_stream.uniform(self._keys[slots], counters.astype(np.uint64))
            watched = self.tokens.fork if fork_banned.any() else None
            found = logits.draw(self.vocab_size, bans, drawn, self._numbers[slots], uniforms, watched)
            result.tokens, good = found.tokens, found.good
            good[hard] = True
            result.tokens[~good] = FAILED_TOKEN
            result.failed = tuple(np.flatnonzero(~good).tolist())
            denied = found.denied & good
        if fetched is not None:
            part = self._sample_on_host(fetched, slots[hard], paths, lengths, counters[hard], fork_banned[hard])
            result.tokens[hard] = part.tokens
            denied[hard] = False
            denied[hard[part.denied]] = True
            result.logprobs = {int(hard[row]): entry for row, entry in part.logprobs.items()}
            result.failed = tuple(sorted((*result.failed, *(int(hard[row]) for row in part.failed))))
        result.denied = np.flatnonzero(denied)
        return result

    def _apply_rules(
        self,
        logits: Float32Array,
        needs: int,
        flags: Int32Array,
        slots: Int32Array | IntArray,
        paths: Int32Array,
        lengths: Int32Array,
        counters: Int32Array,
    ) -> None:
        """Bans other than those of control tokens, biases and penalties, in place."""
        if needs & NO_EOS:
            banned = np.flatnonzero(flags & NO_EOS)
            for token in self.tokens.eos:
                logits[banned, token] = -np.inf
        if needs & MIN_TOKENS:
            young = (flags & MIN_TOKENS).astype(np.bool_) & (counters < self._min_tokens[slots])
            for row in np.flatnonzero(young).tolist():
                logits[row, self._of(slots[row]).stop_ids] = -np.inf
        if needs & BAD_WORDS:
            for row in np.flatnonzero(flags & BAD_WORDS).tolist():
                slot = int(slots[row])
                ban_words(logits[row], self._of(slot), paths[slot, : lengths[slot]])
        if needs & BIAS:
            for row in np.flatnonzero(flags & BIAS).tolist():
                prepared = self._of(slots[row])
                logits[row, prepared.bias_ids] += prepared.bias_values
        if needs & PENALTIES:
            for row in np.flatnonzero(flags & PENALTIES).tolist():
                slot = int(slots[row])
                path = paths[slot, : lengths[slot]]
                penalise(logits[row], self._of(slot).params, path, int(self._prompt_tokens[slot]), self._exempt)

    def _of(self, slot: int | np.int32) -> PreparedParams:
        prepared = self._prepared[slot]
        assert prepared is not None  # flags are zero in a detached slot
        return prepared

    def _draw(
        self,
        logits: Float32Array,
        rows: IntArray,
        slots: Int32Array | IntArray,
        counters: Int32Array,
        peaks: Float32Array,
        tokens: Int32Array,
    ) -> None:
        """Draw tokens of `rows` from their distributions and write them into `tokens`."""
        if len(rows) < len(logits):
            logits, slots, counters, peaks = logits[rows], slots[rows], counters[rows], peaks[rows]
        uniforms = random_stream.uniform(self._keys[slots], counters.astype(np.uint64))
        tokens[rows] = draw(logits, peaks, self._numbers[slots], uniforms)

    def _report(
        self, raw: Float32Array, rows: IntArray, slots: Int32Array | IntArray, good: BoolArray, result: SampleResult
    ) -> None:
        """Log-probabilities of `rows` from their unchanged logits `raw` [len(rows), V]."""
        kept = good[rows]
        if not kept.all():
            raw, rows = raw[kept], rows[kept]
        asked = [self._of(slots[row]).params.logprobs or 0 for row in rows.tolist()]
        entries = log_probabilities(raw, result.tokens[rows], asked)
        result.logprobs.update(zip(rows.tolist(), entries, strict=True))
