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
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.export.manifest import TokenIds
from apar.runtime import random_stream
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.outputs import Logprob
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, Int32Array, IntArray

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
UInt64Array = npt.NDArray[np.uint64]

FAILED_TOKEN = -1
"""Stands in `SampleResult.tokens` where a row failed."""
GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

# What a row needs beyond the two bans and an argmax; one bit each, so that one OR over a step's rows tells.
_RANDOM = 1
_NO_EOS = 2
_MIN_TOKENS = 4
_BAD_WORDS = 8
_BIAS = 16
_PENALTIES = 32
_LOGPROBS = 64

# Columns of the per-slot table of numbers.
_INVERSE_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P = range(4)

# How many of the most likely tokens a draw is tried with, one after the other, before all are sorted.
_CANDIDATES = (64, 1024)
_CHUNK_ELEMENTS = 1 << 18
_ID_BITS = np.uint64(32)
_ID_MASK = np.uint64(0xFFFFFFFF)
_NO_ROWS: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PreparedParams:
    """A request's parameters in the form that `Sampler.attach` copies: made once a request, shared by its branches."""

    params: SamplingParams
    flags: int
    numbers: Float64Array
    """[4] inverse temperature, top-k (0: off), top-p, min-p."""
    stop_ids: IntArray
    """End-of-sequence and stop tokens: what `min_tokens` bans."""
    bias_ids: IntArray
    bias_values: Float32Array
    bad_ids: IntArray
    """Bad words of one token."""
    bad_endings: dict[tuple[int, ...], IntArray]
    """All but the last token of a longer bad word -> the last tokens that complete one."""
    bad_lengths: tuple[int, ...]
    """The lengths of these keys, each once."""


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
        params.validate(self.vocab_size)
        greedy = params.temperature < GREEDY_TEMPERATURE or params.top_k == 1
        penalties = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        flags = 0
        for bit, needed in (
            (_RANDOM, not greedy),
            (_NO_EOS, params.ignore_eos),
            (_MIN_TOKENS, params.min_tokens > 0),
            (_BAD_WORDS, bool(params.bad_words_ids)),
            (_BIAS, bool(params.logit_bias)),
            (_PENALTIES, penalties),
            (_LOGPROBS, params.logprobs is not None),
        ):
            flags |= bit if needed else 0
        inverse = 1.0 if greedy else 1.0 / params.temperature
        bias = params.logit_bias or {}
        endings: dict[tuple[int, ...], list[int]] = {}
        for word in params.bad_words_ids:
            endings.setdefault(tuple(word[:-1]), []).append(word[-1])
        singles = endings.pop((), [])
        return PreparedParams(
            params=params,
            flags=flags,
            numbers=np.array([inverse, params.top_k, params.top_p, params.min_p]),
            stop_ids=np.array(sorted({*self.tokens.eos, *params.stop_token_ids}), dtype=np.int64),
            bias_ids=np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
            bias_values=np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
            bad_ids=np.array(singles, dtype=np.int64),
            bad_endings={prefix: np.array(last, dtype=np.int64) for prefix, last in endings.items()},
            bad_lengths=tuple(sorted({len(prefix) for prefix in endings})),
        )

    def attach(self, slot: int, prepared: PreparedParams, key: int, prompt_tokens: int, *, root: bool = True) -> None:
        """Give a slot to a branch.

        key: the branch's `random_stream` key. prompt_tokens: length of the request's prompt, for children too.
        root: whether this is the request's root branch, the only one that `min_tokens` binds.
        """
        minimum = prepared.params.min_tokens if root else 0
        self._flags[slot] = prepared.flags if minimum else prepared.flags & ~_MIN_TOKENS
        self._keys[slot] = key
        self._prompt_tokens[slot] = prompt_tokens
        self._min_tokens[slot] = minimum
        self._numbers[slot] = prepared.numbers
        self._prepared[slot] = prepared

    def detach(self, slot: int) -> None:
        """Take a slot from its branch. Idempotent."""
        self._flags[slot] = 0
        self._prepared[slot] = None

    def reads_path(self, slots: Int32Array | IntArray) -> BoolArray:
        """bool [L]: rows whose rules read the path. All others may stand in a step several times (draft nodes)."""
        return (self._flags[slots] & (_BAD_WORDS | _PENALTIES)) != 0

    def is_greedy(self, slots: Int32Array | IntArray) -> BoolArray:
        """bool [L]: rows that take the largest logit instead of drawing."""
        return (self._flags[slots] & _RANDOM) == 0

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
        slots: [L] slot of each row's branch. A slot may repeat where `reads_path` is false.
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
        if needs & _LOGPROBS:
            wanting = np.flatnonzero(flags & _LOGPROBS)
            raw = logits[wanting]
        # Bans may overwrite a NaN or an infinity, so what they overwrite is looked at before.
        forking = logits[:, tokens.fork].copy()
        sound = (logits[:, tokens.child] < np.inf) & (forking < np.inf)
        if needs & (_MIN_TOKENS | _BAD_WORDS):
            sound &= logits.max(axis=1) < np.inf
        elif needs & _NO_EOS:
            for token in tokens.eos:
                sound &= logits[:, token] < np.inf
        logits[:, tokens.child] = -np.inf
        logits[fork_banned, tokens.fork] = -np.inf
        if needs & ~(_RANDOM | _LOGPROBS):
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
        if needs & _RANDOM:
            drawing = np.flatnonzero((flags & _RANDOM).astype(np.bool_) & good)
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
        hard = np.flatnonzero(flags & ~(_RANDOM | _NO_EOS))
        # Before `draw`, which may overwrite them.
        fetched = logits.host(hard) if hard.size else None
        result = SampleResult(np.empty(rows, np.int32))
        if hard.size < rows:
            drawn = (flags & _RANDOM).astype(np.bool_)
            drawn[hard] = False
            no_eos = (flags & _NO_EOS).astype(np.bool_)
            bans = [(self.tokens.child, np.ones(rows, np.bool_)), (self.tokens.fork, fork_banned)]
            bans += [(token, no_eos) for token in self.tokens.eos if no_eos.any()]
            uniforms = random_stream.uniform(self._keys[slots], counters.astype(np.uint64))
            result.tokens, good = logits.draw(self.vocab_size, bans, drawn, self._numbers[slots], uniforms)
            good[hard] = True
            result.tokens[~good] = FAILED_TOKEN
            result.failed = tuple(np.flatnonzero(~good).tolist())
        if fetched is not None:
            part = self._sample_on_host(fetched, slots[hard], paths, lengths, counters[hard], fork_banned[hard])
            result.tokens[hard] = part.tokens
            result.logprobs = {int(hard[row]): entry for row, entry in part.logprobs.items()}
            result.failed = tuple(sorted((*result.failed, *(int(hard[row]) for row in part.failed))))
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
        if needs & _NO_EOS:
            banned = np.flatnonzero(flags & _NO_EOS)
            for token in self.tokens.eos:
                logits[banned, token] = -np.inf
        if needs & _MIN_TOKENS:
            young = (flags & _MIN_TOKENS).astype(np.bool_) & (counters < self._min_tokens[slots])
            for row in np.flatnonzero(young).tolist():
                logits[row, self._of(slots[row]).stop_ids] = -np.inf
        if needs & _BAD_WORDS:
            for row in np.flatnonzero(flags & _BAD_WORDS).tolist():
                slot = int(slots[row])
                _ban_words(logits[row], self._of(slot), paths[slot, : lengths[slot]])
        if needs & _BIAS:
            for row in np.flatnonzero(flags & _BIAS).tolist():
                prepared = self._of(slots[row])
                logits[row, prepared.bias_ids] += prepared.bias_values
        if needs & _PENALTIES:
            for row in np.flatnonzero(flags & _PENALTIES).tolist():
                slot = int(slots[row])
                path = paths[slot, : lengths[slot]]
                _penalise(logits[row], self._of(slot).params, path, int(self._prompt_tokens[slot]), self._exempt)

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
        row_slots = slots[rows]
        uniforms = random_stream.uniform(self._keys[row_slots], counters[rows].astype(np.uint64))
        numbers = self._numbers[row_slots]
        # Only without top-k and min-p does the share of a token depend on all others.
        whole = (numbers[:, _TOP_K] == 0) & (numbers[:, _MIN_P] == 0)
        size = max(1, _CHUNK_ELEMENTS // self.vocab_size)
        for needs_total in (False, True):
            members = np.flatnonzero(whole == needs_total)
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                tokens[rows[chunk]] = _draw_chunk(
                    logits[rows[chunk]], peaks[rows[chunk]], numbers[chunk], uniforms[chunk], needs_total
                )

    def _report(
        self, raw: Float32Array, rows: IntArray, slots: Int32Array | IntArray, good: BoolArray, result: SampleResult
    ) -> None:
        """Log-probabilities of `rows` from their unchanged logits `raw` [len(rows), V]."""
        kept = np.flatnonzero(good[rows])
        size = max(1, _CHUNK_ELEMENTS // self.vocab_size)
        for start in range(0, len(kept), size):
            chunk = kept[start : start + size]
            values = raw[chunk]
            peaks = values.max(axis=1)
            normaliser = peaks + np.log(_totals(values, peaks, np.ones(len(chunk))))
            asked = [self._of(slots[row]).params.logprobs or 0 for row in rows[chunk].tolist()]
            ids = _order(values, max(asked)) if max(asked) else None
            for i, row in enumerate(rows[chunk].tolist()):
                token = int(result.tokens[row])
                report = Logprob(token, float(values[i, token] - normaliser[i]))
                if ids is not None:
                    best = ids[i, : asked[i]]
                    report.top = list(zip(best.tolist(), (values[i, best] - normaliser[i]).tolist(), strict=True))
                result.logprobs[row] = report


def _ban_words(logits: Float32Array, prepared: PreparedParams, path: Int32Array) -> None:
    """Ban the tokens that would complete a bad word. logits: [V], path: [length]."""
    logits[prepared.bad_ids] = -np.inf
    if prepared.bad_lengths:
        tail = path[-prepared.bad_lengths[-1] :].tolist()
        for length in prepared.bad_lengths:
            if length <= len(tail):
                last = prepared.bad_endings.get(tuple(tail[-length:]))
                if last is not None:
                    logits[last] = -np.inf


def _penalise(
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


def _order(logits: Float32Array, count: int) -> IntArray:
    """Ids [n, count] of each row's `count` largest logits [n, V], largest first, ties by id. Without NaN."""
    rows, vocab = logits.shape
    spread = vocab // (4 * count)
    if spread < 2:
        keys = _sort_keys(logits, np.arange(vocab, dtype=np.uint64))
        if count < vocab:
            keys = np.partition(keys, count - 1, axis=1)[:, :count]
    else:
        # The count-th largest of the maxima of disjoint groups is no larger than the count-th largest logit, and
        # close to it: a cheap bound that leaves little to sort. In order of (row, id), survivors fill a table.
        groups = vocab // spread
        maxima = logits[:, : groups * spread].reshape(rows, spread, groups).max(axis=1)
        bound = np.partition(maxima, groups - count, axis=1)[:, groups - count]
        row, ids = np.divmod(np.flatnonzero(logits >= bound[:, None]), vocab)
        counts = np.bincount(row, minlength=rows)
        column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        keys = np.full((rows, counts.max()), np.iinfo(np.uint64).max, dtype=np.uint64)
        keys[row, column] = _sort_keys(logits[row, ids], ids.astype(np.uint64))
    keys.sort(axis=1)
    return (keys[:, :count] & _ID_MASK).astype(np.int64)


def _sort_keys(logits: Float32Array, ids: UInt64Array) -> UInt64Array:
    """Integers that sort as (logit descending, id ascending): the float's bits, mapped so that larger floats give
    smaller integers, above the id. Adding zero turns -0.0 into 0.0, with which it must tie."""
    encoded = (logits + np.float32(0)).view(np.int32)
    descending = np.where(encoded < 0, encoded, ~(encoded | np.int32(-(2**31)))).view(np.uint32)
    return (descending.astype(np.uint64) << _ID_BITS) | ids


def _totals(logits: Float32Array, peaks: Float32Array, inverse: Float64Array) -> Float64Array:
    """Sum over each row of exp((logit - peak) * inverse): [n]."""
    with np.errstate(over="ignore"):
        shifted = (logits - peaks[:, None]) * inverse.astype(np.float32)[:, None]
    return np.exp(shifted, out=shifted).sum(axis=1).astype(np.float64)


def _draw_chunk(
    logits: Float32Array, peaks: Float32Array, numbers: Float64Array, uniforms: Float64Array, needs_total: bool
) -> Int32Array:
    """Tokens [n] drawn from rows of logits [n, V]; see the module's text for the rule.

    The work is done on the most likely tokens only; rows whose draw cannot be settled among them are done again
    with more. Cumulative sums of a front part do not depend on what follows it, so this changes no result.
    """
    vocab = logits.shape[1]
    totals = _totals(logits, peaks, numbers[:, _INVERSE_TEMPERATURE]) if needs_total else None
    tokens = np.full(len(logits), FAILED_TOKEN, dtype=np.int32)
    left = np.arange(len(logits))
    for candidates in (*(c for c in _CANDIDATES if c < vocab), vocab):
        part = logits[left] if len(left) < len(logits) else logits
        ids = _order(part, candidates)
        chosen, settled = _pick(
            np.take_along_axis(part, ids, axis=1),
            numbers[left],
            uniforms[left],
            None if totals is None else totals[left],
            vocab,
        )
        picked = np.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]
        tokens[left[settled]] = picked[settled]
        left = left[~settled]
        if not len(left):
            break
    return tokens


def _pick(
    values: Float32Array, numbers: Float64Array, uniforms: Float64Array, totals: Float64Array | None, vocab: int
) -> tuple[IntArray, BoolArray]:
    """Position [n] of each row's draw among its `values` [n, C], the C largest logits in descending order, and
    whether C was enough to tell."""
    count = values.shape[1]
    exact = values.astype(np.float64)
    weights = np.exp((exact - exact[:, :1]) * numbers[:, _INVERSE_TEMPERATURE, None])
    sums = np.cumsum(weights, axis=1)
    # Weights descend, so tokens of weight 0 (banned, or far below) come last and all conditions keep a front part.
    positive = np.count_nonzero(weights, axis=1)
    complete = (positive < count) | (count == vocab)
    if totals is None:
        likely = np.count_nonzero(weights >= numbers[:, _MIN_P, None], axis=1)
        width = np.where(complete, np.minimum(likely, positive), np.where(likely < count, likely, vocab))
        top_k = numbers[:, _TOP_K].astype(np.int64)
        width = np.where(top_k > 0, np.minimum(width, top_k), width)
        settled = width <= count
        width = np.minimum(width, count)
        mass = np.take_along_axis(sums, width[:, None] - 1, axis=1)[:, 0]
    else:
        settled = np.ones(len(values), dtype=np.bool_)
        width = np.where(complete, positive, vocab)
        mass = totals
    top_p = numbers[:, _TOP_P]
    nucleus = np.where(top_p < 1.0, 1 + np.count_nonzero(sums < (top_p * mass)[:, None], axis=1), width)
    narrowed = nucleus < width
    # A nucleus that ends behind the candidates has no known mass.
    settled &= ~narrowed | (nucleus <= count)
    nucleus = np.minimum(np.minimum(nucleus, width), count)
    mass = np.where(narrowed, np.take_along_axis(sums, nucleus[:, None] - 1, axis=1)[:, 0], mass)
    chosen = np.count_nonzero(sums <= (uniforms * mass)[:, None], axis=1)
    settled &= (chosen < count) | complete | (width <= count)
    return np.minimum(chosen, nucleus - 1), settled
