"""A request's parameters in the form that the sampler works with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.sampling.arrays import Float64Array
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, IntArray

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

# What a row needs beyond the two bans and an argmax; one bit each, so that one OR over a step's rows tells.
RANDOM = 1
NO_EOS = 2
MIN_TOKENS = 4
BAD_WORDS = 8
BIAS = 16
PENALTIES = 32
LOGPROBS = 64

# Columns of the numbers.
INVERSE_TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedParams:
    """Made once a request, shared by its branches: what `Sampler.attach` copies."""

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

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int, tokens: TokenIds) -> PreparedParams:
        """Check parameters against the vocabulary and convert them. Raises RequestError.

        `bad_words` must have been resolved (`SamplingParams.with_bad_words`); only `bad_words_ids` count here.
        """
        params.validate(vocab_size)
        greedy = params.temperature < GREEDY_TEMPERATURE or params.top_k == 1
        penalties = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        flags = 0
        for bit, needed in (
            (RANDOM, not greedy),
            (NO_EOS, params.ignore_eos),
            (MIN_TOKENS, params.min_tokens > 0),
            (BAD_WORDS, bool(params.bad_words_ids)),
            (BIAS, bool(params.logit_bias)),
            (PENALTIES, penalties),
            (LOGPROBS, params.logprobs is not None),
        ):
            flags |= bit if needed else 0
        inverse = 1.0 if greedy else 1.0 / params.temperature
        bias = params.logit_bias or {}
        endings: dict[tuple[int, ...], list[int]] = {}
        for word in params.bad_words_ids:
            endings.setdefault(tuple(word[:-1]), []).append(word[-1])
        singles = endings.pop((), [])
        return cls(
            params=params,
            flags=flags,
            numbers=np.array([inverse, params.top_k, params.top_p, params.min_p]),
            stop_ids=np.array(sorted({*tokens.eos, *params.stop_token_ids}), dtype=np.int64),
            bias_ids=np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
            bias_values=np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
            bad_ids=np.array(singles, dtype=np.int64),
            bad_endings={prefix: np.array(last, dtype=np.int64) for prefix, last in endings.items()},
            bad_lengths=tuple(sorted({len(prefix) for prefix in endings})),
        )
