"""What a caller may ask of decoding, and the check of every value."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apar.export.errors import RequestError

MAX_TOKEN_COUNT = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request; every field is checked on construction (RequestError says which and why).

    Token rules act per branch on that branch's own path; see `runtime/sampler.py` for their order.
    Sequences are stored as tuples and `logit_bias` as a copy, so later changes by the caller have no effect.
    """

    max_tokens: int = 512
    """Tokens sampled over the whole tree, at least 1. [Fork]s count, forced [Child]s do not."""
    max_branch_tokens: int | None = None
    """Tokens sampled in any one branch; None: only `max_tokens` and the context limit it."""
    temperature: float = 0.0
    """0..100; 0 (in fact anything below 1e-5) is greedy: the most likely token, ties to the lowest id."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to this, in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the path, prompt included
    (CTRL, arXiv 1909.05858); 0.01..100."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the generated part of the path; -2..2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it stands in the generated part of the path; -2..2."""
    logit_bias: Mapping[int, float] | None = None
    """Token id -> value added to its logit, -100..100. A ban always wins over a bias."""
    bad_words: Sequence[str] = ()
    """Texts that must not be generated; `with_bad_words` turns them into `bad_words_ids`."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """Token sequences that must not be generated: the last token is banned where the path (prompt included)
    ends with the others."""
    stop: Sequence[str] = ()
    """Texts that end the branch in which they appear: at most 64, of 1 to 256 characters."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the branch in which they are sampled, besides end-of-sequence."""
    include_stop_in_output: bool = False
    """Leave the stop string or stop token at the end of the branch's text."""
    ignore_eos: bool = False
    """Ban end-of-sequence, so branches end by limits, stop strings or stop tokens only. (Some servers let it be
    sampled and go on after it; the model then runs outside anything it was trained on.)"""
    min_tokens: int = 0
    """The root branch samples neither end-of-sequence nor a stop token, and heeds no stop string, before it has
    this many tokens of its own. Children may be as short as they like: an empty detail is normal."""
    logprobs: int | None = None
    """How many most likely tokens to report at each position, 0..20 (0: the sampled token only); None: no report."""
    seed: int | None = None
    """0..2**64-1; the same seed gives the same result whatever else runs. None: one is drawn and reported."""
    max_branches: int = 32
    """Branches of the request that may be live at once, the root included; at least 1."""
    max_depth: int = 2
    """Deepest branch; the root has depth 1, so 1 means no forks."""
    fork: bool = True
    """Whether [Fork] may be sampled at all."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, low, high in (
            ("max_tokens", 1, MAX_TOKEN_COUNT),
            ("top_k", 0, MAX_TOKEN_COUNT),
            ("min_tokens", 0, MAX_TOKEN_COUNT),
            ("max_branches", 1, MAX_TOKEN_COUNT),
            ("max_depth", 1, MAX_TOKEN_COUNT),
        ):
            put(self, name, _integer(name, getattr(self, name), low, high))
        for name, low, high in (
            ("max_branch_tokens", 1, MAX_TOKEN_COUNT),
            ("logprobs", 0, MAX_LOGPROBS),
            ("seed", 0, MAX_SEED),
        ):
            if getattr(self, name) is not None:
                put(self, name, _integer(name, getattr(self, name), low, high, "or None"))
        for name, smallest, largest in (
            ("temperature", 0.0, MAX_TEMPERATURE),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            put(self, name, _number(name, getattr(self, name), smallest, largest))
        top_p = _number("top_p", self.top_p, 0.0, 1.0, "above 0 and up to 1")
        if top_p == 0.0:
            raise RequestError(
                "top_p is 0, it must be a number above 0 and up to 1; for greedy decoding set temperature to 0"
            )
        put(self, "top_p", top_p)
        for name in ("include_stop_in_output", "ignore_eos", "fork"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {_show(getattr(self, name))}, it must be true or false")
        put(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_CHARS))
        put(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_STOP_CHARS))
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        put(self, "bad_words_ids", _id_sequences(self.bad_words_ids))
        if self.logit_bias is not None:
            put(self, "logit_bias", _biases(self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, it must not exceed max_tokens, which is {self.max_tokens}"
            )

    def validate(self, vocab_size: int) -> None:
        """Check every token id against the engine's vocabulary. Raises RequestError."""
        last = vocab_size - 1
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias or ()),
            ("bad_words_ids", (token for word in self.bad_words_ids for token in word)),
        ):
            for token in ids:
                if token > last:
                    raise RequestError(f"{name} holds token id {token}, this engine's vocabulary has ids 0 to {last}")

    def with_bad_words(self, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
        """These parameters with the encodings of `bad_words` added to `bad_words_ids`.

        encode: text -> token ids, without BOS or other special tokens. Each word is banned both as given and after
        a blank, because most tokenizers encode a word inside a sentence differently from one at its start.
        """
        if not self.bad_words:
            return self
        found = dict.fromkeys(tuple(word) for word in self.bad_words_ids)
        for word in self.bad_words:
            for text in (word, " " + word.lstrip(" ")):
                ids = tuple(encode(text))
                if ids:
                    found[ids] = None
        return dataclasses.replace(self, bad_words=(), bad_words_ids=tuple(found))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters from a JSON-like mapping; absent names keep their defaults.

        Unknown names are refused, with the nearest known one. Keys of `logit_bias` may be decimal strings, since
        JSON has no other keys. Raises RequestError.
        """
        if not isinstance(values, Mapping):
            raise RequestError(f"sampling parameters are {_show(values)}, they must be a mapping of names to values")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise RequestError(f"unknown sampling parameter {_show(name)}; {hint}")
        arguments = dict(values)
        bias = arguments.get("logit_bias")
        if isinstance(bias, Mapping):
            arguments["logit_bias"] = {
                int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key: value
                for key, value in bias.items()
            }
        return cls(**arguments)


def _show(value: object) -> str:
    """A value as an error message quotes it, at a bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit of digits
        text = "a huge integer"
    return text if len(text) <= 80 else text[:77] + "..."


def _integer(name: str, value: object, low: int, high: int, also: str = "") -> int:
    bounds = f"an integer from {low} to {high} {also}".rstrip()
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= int(value) <= high:
        raise RequestError(f"{name} is {_show(value)}, it must be {bounds}")
    return int(value)


def _number(name: str, value: object, low: float, high: float, bounds: str = "") -> float:
    # A NaN fails every comparison, so it is refused too; an integer too large for a float compares without one.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not low <= value <= high
    ):
        raise RequestError(f"{name} is {_show(value)}, it must be a number {bounds or f'from {low:g} to {high:g}'}")
    return float(value)


def _items(name: str, values: object, limit: int, kind: str) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RequestError(f"{name} is {_show(values)}, it must be a list of {kind}")
    items = tuple(values)
    if len(items) > limit:
        raise RequestError(f"{name} has {len(items)} entries, at most {limit} are allowed")
    return items


def _strings(name: str, values: object, limit: int, longest: int) -> tuple[str, ...]:
    items = (values,) if isinstance(values, str) else _items(name, values, limit, "strings")
    for item in items:
        if not isinstance(item, str):
            raise RequestError(f"{name} holds {_show(item)}, every entry must be a string")
        if not 1 <= len(item) <= longest:
            raise RequestError(f"{name} holds a string of {len(item)} characters, 1 to {longest} are allowed")
    return items


def _token_ids(name: str, values: object, limit: int) -> tuple[int, ...]:
    items = _items(name, values, limit, "token ids")
    return tuple(_integer(f"a token id in {name}", item, 0, MAX_TOKEN_COUNT) for item in items)


def _id_sequences(values: object) -> tuple[tuple[int, ...], ...]:
    # A word may have two encodings, so twice as many sequences as words.
    words = _items("bad_words_ids", values, 2 * MAX_BAD_WORDS, "lists of token ids")
    sequences = tuple(_token_ids("bad_words_ids", word, MAX_BAD_WORD_TOKENS) for word in words)
    if () in sequences:
        raise RequestError("bad_words_ids holds an empty list, every entry must hold at least one token id")
    return sequences


def _biases(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise RequestError(f"logit_bias is {_show(values)}, it must be a mapping of token ids to numbers")
    if len(values) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(values)} entries, at most {MAX_LOGIT_BIAS} are allowed")
    result = {}
    for key, value in values.items():
        token = _integer("a token id in logit_bias", key, 0, MAX_TOKEN_COUNT)
        result[token] = _number(f"logit_bias of token {token}", value, -100.0, 100.0)
    return result
