"""Sampler and random streams, held against a row-by-row reference in plain Python and against `transformers`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apar.export.errors import ExecutorError, RequestError
from apar.export.manifest import TokenIds
from apar.runtime import random_stream
from apar.runtime.random_stream import child_key, root_key, uniform
from apar.runtime.sampler import FAILED_TOKEN, Sampler, SampleResult
from apar.runtime.sampling import arrays, drawing
from apar.runtime.sampling.largest import largest, largest_values
from apar.runtime.sampling_params import SamplingParams

VOCAB = 60
TOKENS = TokenIds(fork=58, child=59, eos=(2, 3), bos=1, pad=0)
CONTROL = {2, 3, 58, 59}
INF = float("inf")


class Batch:
    """Rows to sample, each with its own parameters and path."""

    def __init__(self, vocab: int = VOCAB, tokens: TokenIds = TOKENS, capacity: int = 64) -> None:
        self.sampler = Sampler(vocab, tokens, capacity)
        self.paths = np.zeros((capacity, 128), dtype=np.int32)
        self.lengths = np.zeros(capacity, dtype=np.int32)

    def add(
        self,
        slot: int,
        params: SamplingParams,
        path: Sequence[int] = (1, 4),
        prompt: int = 2,
        key: int = 7,
        root: bool = True,
    ) -> None:
        self.sampler.attach(slot, self.sampler.prepare(params), key, prompt, root=root)
        self.paths[slot, : len(path)] = path
        self.lengths[slot] = len(path)

    def sample(
        self,
        logits: Any,
        slots: Sequence[int] | None = None,
        counters: Sequence[int] | int = 0,
        fork_banned: Sequence[bool] | bool = False,
    ) -> SampleResult:
        logits = np.array(logits, dtype=np.float32)
        rows = np.arange(len(logits)) if slots is None else np.array(slots)
        return self.sampler.sample(
            logits,
            rows.astype(np.int32),
            self.paths,
            self.lengths,
            np.broadcast_to(np.asarray(counters, dtype=np.int32), len(logits)).copy(),
            np.broadcast_to(np.asarray(fork_banned), len(logits)).copy(),
        )


def one(logits: Any, params: SamplingParams, counter: int = 0, fork_banned: bool = False, **branch: Any) -> int:
    """The token of a single row."""
    batch = Batch()
    batch.add(0, params, **branch)
    return int(batch.sample([logits], counters=counter, fork_banned=fork_banned).tokens[0])


def ramp(**peaks: float) -> np.ndarray:
    """Logits falling with the id from 0 by 0.1, with some set: t7=5.0 sets token 7."""
    logits = -0.1 * np.arange(VOCAB, dtype=np.float32)
    for name, value in peaks.items():
        logits[int(name[1:])] = value
    return logits


# The reference: one row, plain Python, the module's rules one after the other.


def ruled_logits(
    logits: np.ndarray,
    params: SamplingParams,
    path: list[int],
    prompt: int,
    counter: int,
    fork_banned: bool,
    root: bool,
) -> list[float]:
    result = [float(x) for x in logits]
    banned = {TOKENS.child}
    if fork_banned:
        banned.add(TOKENS.fork)
    if params.ignore_eos:
        banned.update(TOKENS.eos)
    if root and counter < params.min_tokens:
        banned.update(TOKENS.eos, params.stop_token_ids)
    for word in params.bad_words_ids:
        prefix = list(word[:-1])
        if len(prefix) <= len(path) and path[len(path) - len(prefix) :] == prefix:
            banned.add(word[-1])
    for token, bias in (params.logit_bias or {}).items():
        result[token] = float(np.float32(result[token]) + np.float32(bias))
    for token in set(path) - CONTROL:
        value = np.float32(result[token])
        penalty = np.float32(params.repetition_penalty)
        result[token] = float(value / penalty if value > 0 else value * penalty)
    generated = path[prompt:]
    for token in set(generated) - CONTROL:
        lost = params.frequency_penalty * generated.count(token) + params.presence_penalty
        result[token] = float(np.float32(result[token]) - np.float32(lost))
    return [-INF if token in banned else value for token, value in enumerate(result)]


def kept_tokens(logits: list[float], params: SamplingParams) -> list[tuple[int, float]]:
    """(id, weight) of the tokens that may be drawn, in drawing order."""
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    top = logits[order[0]]
    kept = [(t, math.exp((logits[t] - top) / params.temperature)) for t in order if logits[t] > -INF]
    kept = [(t, w) for t, w in kept if w > 0 and w >= params.min_p]
    if params.top_k:
        kept = kept[: params.top_k]
    total = sum(w for _, w in kept)
    nucleus: list[tuple[int, float]] = []
    reached = 0.0
    for token, weight in kept:
        if nucleus and reached >= params.top_p * total:
            break
        nucleus.append((token, weight))
        reached += weight
    return nucleus if params.top_p < 1 else kept


def reference(
    logits: np.ndarray,
    params: SamplingParams,
    path: list[int],
    prompt: int,
    key: int,
    counter: int,
    fork: bool,
    root: bool,
) -> int:
    ruled = ruled_logits(logits, params, path, prompt, counter, fork, root)
    if params.temperature < 1e-5:
        return max(range(len(ruled)), key=lambda t: (ruled[t], -t))
    kept = kept_tokens(ruled, params)
    target = float(uniform(np.array([key], np.uint64), np.array([counter], np.uint64))[0]) * sum(w for _, w in kept)
    for token, weight in kept:
        target -= weight
        if target < 0:
            return token
    return kept[-1][0]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 30, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    logit_bias=st.none()
    | st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 3.0, 100.0]), max_size=4),
    bad_words_ids=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), max_size=4),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 3]),
    logprobs=st.sampled_from([None, None, 0, 3]),
)
ROW = st.tuples(
    PARAMS,
    st.lists(st.integers(0, 8) | st.sampled_from([58, 59]), max_size=20),  # generated part of the path
    st.integers(0, 2**64 - 1),  # seed
    st.integers(0, 5),  # counter
    st.booleans(),  # fork banned
    st.booleans(),  # root
)


def fill(rows: list[Any], seed: int) -> tuple[Batch, np.ndarray, list[int], list[bool], list[list[int]]]:
    batch = Batch()
    logits = (np.random.default_rng(seed).standard_normal((len(rows), VOCAB)) * 3).astype(np.float32)
    paths = [[1, 4, 5, 6, *row[1]] for row in rows]
    for slot, (params, _, key, _, _, root) in enumerate(rows):
        batch.add(slot, params, paths[slot], 4, root_key(key), root)
    return batch, logits, [row[3] for row in rows], [row[4] for row in rows], paths


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ROW, min_size=1, max_size=8), st.integers(0, 2**32))
def test_every_rule_equals_the_reference(rows: list[Any], seed: int) -> None:
    batch, logits, counters, banned, paths = fill(rows, seed)
    result = batch.sample(logits, counters=counters, fork_banned=banned)
    assert result.failed == ()
    for i, (params, _, key, counter, fork, root) in enumerate(rows):
        assert result.tokens[i] == reference(logits[i], params, paths[i], 4, root_key(key), counter, fork, root)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ROW, min_size=1, max_size=8), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_the_others(rows: list[Any], seed: int, random: Any) -> None:
    batch, logits, counters, banned, _ = fill(rows, seed)
    whole = batch.sample(logits, counters=counters, fork_banned=banned)
    order = list(range(len(rows)))
    random.shuffle(order)
    mixed = batch.sample(logits[order], order, [counters[i] for i in order], [banned[i] for i in order])
    for place, i in enumerate(order):
        alone = batch.sample(logits[i : i + 1], [i], counters[i], banned[i])
        assert alone.tokens[0] == whole.tokens[i] == mixed.tokens[place]
        assert alone.logprobs.get(0) == whole.logprobs.get(i) == mixed.logprobs.get(place)


@pytest.mark.parametrize("vocab", [1000, 4999])
def test_a_row_does_not_depend_on_the_others_in_a_large_vocabulary(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: chunks and candidate counts, which only save work, change nothing."""
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((48, vocab)) * rng.choice([0.1, 2, 6], (48, 1))).astype(np.float32)
    logits[::5] = np.round(logits[::5])  # many ties
    batch = Batch(vocab, TokenIds(5, 6, (2,)))
    for slot in range(48):
        params = SamplingParams(
            temperature=float(rng.choice([0.5, 1.0, 3.0])),
            top_k=int(rng.choice([0, 3, 100, 2000])),
            top_p=float(rng.choice([0.5, 0.99, 1.0])),
            min_p=float(rng.choice([0.0, 0.0, 0.001, 0.1])),
            logprobs=3,
        )
        batch.add(slot, params, key=root_key(slot))
    whole = batch.sample(logits)
    for i in range(48):
        alone = batch.sample(logits[i : i + 1], [i])
        assert alone.tokens[0] == whole.tokens[i] and alone.logprobs[0] == whole.logprobs[i]
    monkeypatch.setattr(arrays, "CHUNK_ELEMENTS", 3 * vocab)
    monkeypatch.setattr(drawing, "CANDIDATES", ())
    sorted_all = batch.sample(logits)
    assert sorted_all.tokens.tolist() == whole.tokens.tolist() and sorted_all.logprobs == whole.logprobs


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 700), st.integers(1, 80), st.integers(0, 2**32), st.booleans())
def test_order_is_that_of_a_stable_sort(vocab: int, count: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((3, vocab)).astype(np.float32) * 4
    if ties:
        logits = np.round(logits)
        logits[rng.random(logits.shape) < 0.3] = -0.0
        logits[rng.random(logits.shape) < 0.3] = -np.inf
    count = min(count, vocab)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    assert np.array_equal(largest(logits, count), expected)
    values = largest_values(logits, count)
    assert np.array_equal(values, np.take_along_axis(logits, expected, axis=1))


# Against `transformers`.


@pytest.fixture(scope="module")
def processors() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("TemperatureLogitsWarper", 0.6, {"temperature": 0.6}),
        ("TopKLogitsWarper", 7, {"top_k": 7}),
        ("TopPLogitsWarper", 0.8, {"top_p": 0.8}),
        ("MinPLogitsWarper", 0.1, {"min_p": 0.1}),
        ("RepetitionPenaltyLogitsProcessor", 1.4, {"repetition_penalty": 1.4}),
    ],
)
def test_rules_of_transformers(processors: Any, name: str, argument: float, values: dict[str, Any]) -> None:
    """Draws at evenly spread random numbers show each token's share: it equals the library's distribution."""
    import torch

    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(VOCAB) * 2).astype(np.float32)
    logits[[58, 59]] = -np.inf
    path = [1, *rng.integers(4, 30, 20).tolist()]
    processed = getattr(processors, name)(argument)(torch.tensor([path]), torch.tensor(logits)[None])
    wanted = torch.softmax(processed.double(), -1)[0].numpy()

    draws = 4000
    params = SamplingParams(**{"temperature": 1.0, **values})
    batch = Batch()
    batch.add(0, params, path, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_stream, "uniform", lambda keys, counters: (counters + 0.5) / draws)
        tokens = batch.sample(np.tile(logits, (draws, 1)), [0] * draws, range(draws)).tokens
    shares = np.bincount(tokens, minlength=VOCAB) / draws
    assert np.abs(shares - wanted).max() <= 1.01 / draws


def test_log_probabilities_are_the_models_own(processors: Any) -> None:
    import torch

    logits = (np.random.default_rng(4).standard_normal((3, VOCAB)) * 5).astype(np.float32)
    wanted = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    batch = Batch()
    params = SamplingParams(logprobs=4, temperature=0.5, top_k=3, logit_bias={9: 50.0}, repetition_penalty=2.0)
    batch.add(0, params)
    batch.add(1, SamplingParams())
    batch.add(2, SamplingParams(logprobs=0))
    result = batch.sample(logits)
    assert sorted(result.logprobs) == [0, 2]
    for row, report in result.logprobs.items():
        assert report.token_id == result.tokens[row]
        assert report.logprob == pytest.approx(wanted[row, report.token_id], abs=1e-5)
    top = np.argsort(-wanted[0])[:4]
    assert [token for token, _ in result.logprobs[0].top] == top.tolist()
    assert [value for _, value in result.logprobs[0].top] == pytest.approx(wanted[0, top].tolist(), abs=1e-5)
    assert result.logprobs[0].token_id == 9 and result.logprobs[2].top == []


# Single rules, spelled out.


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert one(ramp(t7=5, t30=5), SamplingParams()) == 7
    assert one(ramp(t7=5, t30=5), SamplingParams(temperature=1e-6)) == 7
    assert one(ramp(t7=5, t30=5), SamplingParams(temperature=1.0, top_k=1)) == 7
    assert one(ramp(t7=-0.0, t0=-1, t30=0.0), SamplingParams()) == 7


def test_top_k_takes_exactly_k_of_equal_logits() -> None:
    logits = np.zeros(VOCAB)
    seen = {one(logits, SamplingParams(temperature=1.0, top_k=3), counter=i) for i in range(60)}
    assert seen == {0, 1, 2}


def test_child_is_never_sampled_and_fork_only_where_allowed() -> None:
    logits = ramp(t59=50, t58=40)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(logit_bias={59: 100.0, 58: 100.0}),
    ):
        assert one(logits, params) == 58
        assert one(logits, params, fork_banned=True) not in (58, 59)


def test_fork_ban_is_a_matter_of_the_row() -> None:
    batch = Batch()
    for slot in range(3):
        batch.add(slot, SamplingParams())
    assert batch.sample([ramp(t58=9)] * 3, fork_banned=[True, False, True]).tokens.tolist() == [0, 58, 0]


def test_bans_beat_biases() -> None:
    logits = ramp()
    assert one(logits, SamplingParams(ignore_eos=True, logit_bias={2: 100.0, 5: 50.0})) == 5
    assert one(logits, SamplingParams(min_tokens=1, stop_token_ids=[9], logit_bias={9: 100.0, 5: 50.0})) == 5
    assert one(logits, SamplingParams(bad_words_ids=[[9]], logit_bias={9: 100.0, 5: 50.0})) == 5


def test_min_tokens_binds_the_root_alone() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[9])
    logits = ramp(t2=9, t3=8, t9=7)
    assert [one(logits, params, counter=i) for i in range(5)] == [0, 0, 0, 2, 2]
    assert [one(logits, params, counter=i, root=False) for i in range(2)] == [2, 2]


def test_a_stop_token_may_be_sampled_under_ignore_eos() -> None:
    assert one(ramp(t2=9, t3=8, t9=7), SamplingParams(ignore_eos=True, stop_token_ids=[9])) == 9


def test_bad_words_are_banned_at_their_last_token() -> None:
    params = SamplingParams(bad_words_ids=[[7, 8, 9], [7, 8, 10], [5, 6], [4]])
    logits = ramp(t9=9, t10=8, t6=7, t4=20, t20=6)
    assert one(logits, params, path=[1, 7, 8]) == 6
    assert one(logits, params, path=[1, 7, 8], prompt=3) == 6  # begun in the prompt
    assert one(logits, params, path=[7, 1, 8]) == 9
    assert one(logits, params, path=[5]) == 9
    assert one(logits, SamplingParams(bad_words_ids=[[7, 8, 9]]), path=[8]) == 4  # a path shorter than the word


def test_bias_adds() -> None:
    assert one(ramp(), SamplingParams(logit_bias={30: 3.1})) == 30
    assert one(ramp(), SamplingParams(logit_bias={30: 2.9})) == 0


def test_penalties_spare_control_tokens() -> None:
    params = SamplingParams(repetition_penalty=50.0, presence_penalty=2.0, frequency_penalty=2.0)
    path = [1, 4, 58, 58, 59, 58, 2, 3]
    for token in (58, 2, 3):
        logits = ramp(**{f"t{token}": 1.0, "t20": 0.9})
        assert one(logits, params, path=path, prompt=1) == token
    assert one(ramp(t4=1.0, t20=0.9), params, path=path, prompt=1) == 20


def test_presence_and_frequency_count_the_generated_part() -> None:
    logits = ramp(t10=2.0, t11=1.9, t12=1.3)
    assert one(logits, SamplingParams(presence_penalty=1.0), path=[10, 11], prompt=2) == 10
    assert one(logits, SamplingParams(presence_penalty=1.0), path=[10, 11, 10, 10], prompt=2) == 11
    assert one(logits, SamplingParams(frequency_penalty=0.4), path=[11, 11, 10, 10, 11, 11], prompt=2) == 12
    assert one(logits, SamplingParams(frequency_penalty=-0.2), path=[10, 11], prompt=1) == 11


def test_a_broken_row_fails_alone() -> None:
    every = [[token] for token in range(VOCAB)]
    cases: list[tuple[SamplingParams, np.ndarray]] = [
        (SamplingParams(), ramp(t9=float("nan"))),
        (SamplingParams(temperature=1.0), ramp(t59=float("nan"))),
        (SamplingParams(), ramp(t58=float("nan"))),
        (SamplingParams(), np.full(VOCAB, -INF)),
        (SamplingParams(temperature=1.0), ramp(t9=INF)),
        (SamplingParams(logprobs=2), ramp(t59=INF)),
        (SamplingParams(ignore_eos=True, logprobs=2), ramp(t2=float("nan"))),
        (SamplingParams(bad_words_ids=every), ramp()),
        (SamplingParams(temperature=0.7, top_p=0.9, logprobs=1), ramp(t9=float("nan"))),
    ]
    batch = Batch()
    for i, (params, _) in enumerate(cases):
        batch.add(2 * i, SamplingParams(temperature=1.0, logprobs=1), key=root_key(i))
        batch.add(2 * i + 1, params)
    logits = [row for _, broken in cases for row in (ramp(), broken)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = batch.sample(logits, fork_banned=True)
        healthy = batch.sample(logits[::2], range(0, len(logits), 2), fork_banned=True)
    assert result.failed == tuple(range(1, len(logits), 2))
    assert set(result.tokens[1::2].tolist()) == {FAILED_TOKEN}
    assert result.tokens[::2].tolist() == healthy.tokens.tolist()
    assert sorted(result.logprobs) == list(range(0, len(logits), 2))


def test_extreme_logits_are_no_failure() -> None:
    logits = np.full(VOCAB, -3e38)
    logits[20] = 3e38
    params = SamplingParams(temperature=0.01, top_p=0.9, logprobs=1, repetition_penalty=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for top_k in (0, 40):
            assert one(logits, SamplingParams(temperature=0.01, top_k=top_k, min_p=0.1 if top_k else 0.0)) == 20
        assert one(logits, params, path=[1, 20]) == 20


def test_only_unbanned_tokens_are_drawn() -> None:
    logits = np.full(VOCAB, -INF)
    logits[[20, 30]] = 1.0
    for values in ({}, {"top_k": 50}, {"top_p": 0.999999}, {"min_p": 1e-9}):
        params = SamplingParams(temperature=100.0, **values)
        assert {one(logits, params, counter=i) for i in range(40)} == {20, 30}


def test_padding_of_the_vocabulary_is_ignored() -> None:
    batch = Batch()
    batch.add(0, SamplingParams(logprobs=2))
    batch.add(1, SamplingParams(temperature=1.0))
    padded = np.full((2, VOCAB + 4), 99, dtype=np.float32)
    padded[:, :VOCAB] = ramp(t5=3)
    plain, result = batch.sample(padded[:, :VOCAB]), batch.sample(padded)
    assert result.tokens.tolist() == plain.tokens.tolist()
    assert result.logprobs == plain.logprobs


def test_logits_that_belie_the_manifest_are_refused() -> None:
    batch = Batch()
    batch.add(0, SamplingParams())
    with pytest.raises(ExecutorError, match=r"logits have shape \(1, 10\)"):
        batch.sample(np.zeros((1, 10)))
    with pytest.raises(ExecutorError, match=r"wanted are float32 and 2 rows"):
        batch.sample(np.zeros((1, VOCAB)), slots=[0, 0])


def test_read_only_logits_and_no_rows() -> None:
    batch = Batch()
    batch.add(0, SamplingParams())
    logits = np.array([ramp(t59=9, t8=5)], dtype=np.float32)
    logits.flags.writeable = False
    zero = np.zeros(1, dtype=np.int32)
    assert batch.sampler.sample(logits, zero, batch.paths, batch.lengths, zero, zero.astype(bool)).tokens.tolist() == [
        8
    ]
    empty = batch.sample(np.zeros((0, VOCAB)))
    assert empty.tokens.shape == (0,) and empty.failed == () and empty.logprobs == {}


def test_slots_forget_their_last_branch() -> None:
    batch = Batch()
    batch.add(0, SamplingParams(logit_bias={30: 100.0}, min_tokens=5, logprobs=1))
    batch.sampler.detach(0)
    batch.sampler.detach(0)
    batch.add(0, SamplingParams())
    result = batch.sample([ramp(t2=5)])
    assert result.tokens.tolist() == [2] and result.logprobs == {}


def test_what_a_row_needs() -> None:
    batch = Batch()
    for slot, params in enumerate(
        (
            SamplingParams(ignore_eos=True, min_tokens=2, logprobs=0, logit_bias={1: 1.0}),
            SamplingParams(temperature=1.0),
            SamplingParams(presence_penalty=0.1),
            SamplingParams(bad_words_ids=[[1, 2]]),
        )
    ):
        batch.add(slot, params)
    slots = np.arange(4, dtype=np.int32)
    assert batch.sampler.is_bare(slots).tolist() == [False] * 4
    assert batch.sampler.is_greedy(slots).tolist() == [True, False, True, True]


def test_preparing_checks_the_vocabulary() -> None:
    with pytest.raises(RequestError, match="stop_token_ids holds token id 60"):
        Batch().sampler.prepare(SamplingParams(stop_token_ids=[60]))


# Statistics.


def chi_square_bound(cells: int) -> float:
    """Value that a chi-square statistic of `cells` cells exceeds with probability about 1e-6 (Wilson-Hilferty)."""
    degrees = cells - 1
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: np.ndarray, shares: np.ndarray | None = None) -> float:
    expected = counts.sum() * (np.full(counts.shape, 1 / counts.size) if shares is None else shares)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("values", [{}, {"top_k": 8}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(values: dict[str, Any]) -> None:
    rng = np.random.default_rng(8)
    logits = (rng.standard_normal(VOCAB) * 1.5).astype(np.float32)
    params = SamplingParams(temperature=1.3, **values)
    draws = 20000
    batch = Batch()
    batch.add(0, params, key=root_key(11))
    tokens = batch.sample(np.tile(logits, (draws, 1)), [0] * draws, range(draws)).tokens
    kept = kept_tokens(ruled_logits(logits, params, [1, 4], 2, 0, False, True), params)
    ids, weights = [t for t, _ in kept], np.array([w for _, w in kept])
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[ids].sum() == draws
    assert chi_square(counts[ids], weights / weights.sum()) < chi_square_bound(len(ids))


def test_seeds_reproduce_and_siblings_differ() -> None:
    logits = np.zeros((32, VOCAB))
    root = root_key(123)

    def text(key: int) -> list[int]:
        batch = Batch()
        batch.add(0, SamplingParams(temperature=1.0), key=key)
        return batch.sample(logits, [0] * 32, range(32)).tokens.tolist()

    assert text(root) == text(root_key(123))
    assert text(child_key(root, 0)) == text(child_key(root, 0))
    keys = [root, root_key(124), child_key(root, 0), child_key(root, 1), child_key(child_key(root, 0), 0)]
    assert len({tuple(text(key)) for key in keys}) == len(keys)


# Random streams.


def stream(key: int, count: int, first: int = 0) -> np.ndarray:
    return uniform(np.full(count, key, np.uint64), np.arange(first, first + count, dtype=np.uint64))


def test_random_values_are_fixed_for_ever() -> None:
    """Golden values: a change here changes what every stored seed gives."""
    root = root_key(0)
    assert root == 0xFB73C6A1D758F58A
    assert root_key(2**64 - 1) == 0x3B7AB175B55C544D
    assert child_key(root, 0) == 0x14C409D5F5400433
    assert child_key(child_key(root, 2), 1) == 0x4BEC789E995F5BB7
    expected = ["0x1.2089b4988c01ep-2", "0x1.400862866b4a9p-1", "0x1.e945d00323eb6p-2", "0x1.b19dd2d9c1318p-4"]
    assert [float(x).hex() for x in stream(root, 4)] == expected


def test_scalar_and_array_mixing_agree() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    mixed = random_stream._mix_array(np.array(values, dtype=np.uint64))
    assert [int(x) for x in mixed] == [random_stream._mix(x) for x in values]
    # SplitMix64 seeded with 0 begins with this number (reference implementation of S. Vigna).
    assert random_stream._mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_numbers_lie_strictly_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_stream, "bits", lambda keys, counters: np.array([0, 2**64 - 1], dtype=np.uint64))
    low, high = uniform(np.zeros(2, np.uint64), np.zeros(2, np.uint64))
    assert 0.0 < low < high < 1.0 and low == 1.0 - high


@pytest.mark.parametrize("kind", ["one branch", "siblings", "seeds", "nested"])
def test_uniformity(kind: str) -> None:
    """Numbers of one branch, the first ones of siblings, of neighbouring seeds, of branches ever deeper."""
    count = 100_000
    if kind == "one branch":
        numbers = stream(root_key(42), count)
    else:
        root = root_key(42)
        if kind == "siblings":
            keys = [child_key(root, i) for i in range(count)]
        elif kind == "seeds":
            keys = [root_key(i) for i in range(count)]
        else:
            keys = []
            for i in range(count):
                root = child_key(root, i % 2)
                keys.append(root)
        numbers = uniform(np.array(keys, dtype=np.uint64), np.zeros(count, np.uint64))
    assert chi_square(np.histogram(numbers, 256, (0, 1))[0]) < chi_square_bound(256)
    pairs = np.histogram2d(numbers[:-1:2], numbers[1::2], 16, ((0, 1), (0, 1)))[0]
    assert chi_square(pairs) < chi_square_bound(256)


def test_streams_of_relatives_are_independent() -> None:
    count = 50_000
    root = root_key(9)
    relatives = {
        "parent": root,
        "first": child_key(root, 0),
        "second": child_key(root, 1),
        "grandchild": child_key(child_key(root, 0), 0),
        "next seed": root_key(10),
    }
    streams = {name: stream(key, count) for name, key in relatives.items()}
    names = list(streams)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            for shift in (0, 1):
                a, b = streams[left][shift:], streams[right][: count - shift]
                table = np.histogram2d(a, b, 16, ((0, 1), (0, 1)))[0]
                assert chi_square(table) < chi_square_bound(256), (left, right, shift)
                assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(count)


def test_no_collisions() -> None:
    """A million 64-bit values over seeds, paths and counters are all different, as are their keys."""
    keys = []
    for seed in range(100):
        root = root_key(seed)
        children = [child_key(root, i) for i in range(9)]
        keys += [root, *children, *(child_key(child, i) for child in children for i in range(10))]
    assert len(set(keys)) == len(keys) == 10_000
    values = random_stream.bits(
        np.repeat(np.array(keys, dtype=np.uint64), 100), np.tile(np.arange(100, dtype=np.uint64), len(keys))
    )
    assert len(np.unique(values)) == 1_000_000


def test_fresh_seeds() -> None:
    seeds = {random_stream.fresh_seed() for _ in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 2**53 for seed in seeds)
    SamplingParams(seed=max(seeds))
