"""SamplingParams: every bad value is refused with a sentence that names it and the allowed range."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apar.export.errors import RequestError
from apar.runtime.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")
INTEGERS = ("max_tokens", "max_branch_tokens", "top_k", "min_tokens", "logprobs", "seed", "max_branches", "max_depth")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def test_defaults_are_greedy_and_valid() -> None:
    params = SamplingParams()
    params.validate(vocab_size=1)
    assert (params.max_tokens, params.temperature, params.max_branches, params.max_depth) == (512, 0.0, 32, 2)
    assert params.fork and not params.ignore_eos and params.logprobs is None


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "from 1 to"),
    ("max_tokens", 2**31, "from 1 to 2147483647"),
    ("max_branch_tokens", 0, "from 1 to 2147483647 or None"),
    ("temperature", -0.1, "from 0 to 100"),
    ("temperature", 101, "from 0 to 100"),
    ("temperature", 10**400, "from 0 to 100"),
    ("top_k", -1, "from 0 to"),
    ("top_p", 0, "above 0 and up to 1"),
    ("top_p", 1.01, "above 0 and up to 1"),
    ("top_p", -0.5, "above 0 and up to 1"),
    ("min_p", 1.5, "from 0 to 1"),
    ("repetition_penalty", 0, "from 0.01 to 100"),
    ("presence_penalty", 2.5, "from -2 to 2"),
    ("frequency_penalty", -2.5, "from -2 to 2"),
    ("logprobs", 21, "from 0 to 20 or None"),
    ("logprobs", -1, "from 0 to 20 or None"),
    ("seed", -1, "from 0 to 18446744073709551615 or None"),
    ("seed", 2**64, "from 0 to 18446744073709551615 or None"),
    ("seed", 10**5000, "a huge integer"),
    ("max_branches", 0, "from 1 to"),
    ("max_depth", 0, "from 1 to"),
    ("stop", [""], "0 characters, 1 to 256"),
    ("stop", ["x" * 257], "257 characters, 1 to 256"),
    ("stop", ["x"] * 65, "65 entries, at most 64"),
    ("stop", [1], "every entry must be a string"),
    ("stop", 5, "a list of strings"),
    ("stop", {"a": 1}, "a list of strings"),
    ("bad_words", ["a"] * 1025, "1025 entries, at most 1024"),
    ("bad_words", [None], "every entry must be a string"),
    ("bad_words_ids", [[]], "an empty list"),
    ("bad_words_ids", [3], "a list of token ids"),
    ("bad_words_ids", [["3"]], "'3'"),
    ("bad_words_ids", [[-3]], "-3"),
    ("stop_token_ids", [-1], "-1"),
    ("stop_token_ids", [True], "True"),
    ("stop_token_ids", "12", "a list of token ids"),
    ("stop_token_ids", range(1025), "1025 entries, at most 1024"),
    ("logit_bias", [1], "a mapping of token ids to numbers"),
    ("logit_bias", {"1": 1.0}, "'1'"),
    ("logit_bias", {-1: 1.0}, "-1"),
    ("logit_bias", {1: NAN}, "logit_bias of token 1 is nan, it must be a number from -100 to 100"),
    ("logit_bias", {1: INF}, "inf"),
    ("logit_bias", {1: None}, "None"),
    ("logit_bias", dict.fromkeys(range(1025), 0.0), "1025 entries, at most 1024"),
    ("ignore_eos", 1, "true or false"),
    ("fork", "yes", "true or false"),
    ("include_stop_in_output", None, "true or false"),
]


@pytest.mark.parametrize(
    ("name", "value", "says"), BAD_VALUES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD_VALUES)]
)
def test_bad_values(name: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value) and says in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, False, "1", 1.0, NAN, INF, [1], b"1"])
def test_integers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*, it must be an integer from"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", "0.5", NAN, INF, -INF, None, 1j, [0.5]])
def test_numbers_are_finite_numbers(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*, it must be a number"):
        SamplingParams(**{name: value})


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(RequestError, match="min_tokens is 6, it must not exceed max_tokens, which is 5"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_limits_themselves_are_allowed() -> None:
    SamplingParams(
        max_tokens=1, top_p=1, min_p=1, repetition_penalty=0.01, presence_penalty=-2, frequency_penalty=2, logprobs=20,
        seed=2**64 - 1, max_branches=1, max_depth=1, stop=["x" * 256] * 64, logit_bias=dict.fromkeys(range(1024), -100),
    )  # fmt: skip


def test_numpy_scalars_become_python_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([4, 5]))  # type: ignore[arg-type]
    assert type(params.temperature) is float and type(params.top_k) is int
    assert params.stop_token_ids == (4, 5) and type(params.stop_token_ids[0]) is int


def test_one_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(bad_words="no").bad_words == ("no",)


def test_caller_keeps_no_hold() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[3] = 4.0
    assert params.stop == ("a",) and params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 3  # type: ignore[misc]


def test_copies_and_pickles() -> None:
    params = SamplingParams(temperature=0.7, stop=["a"], logit_bias={1: 2.0}, seed=3)
    assert pickle.loads(pickle.dumps(params)) == params == copy.deepcopy(params)


@pytest.mark.parametrize("values", [{"stop_token_ids": [10]}, {"logit_bias": {10: 1.0}}, {"bad_words_ids": [[1, 10]]}])
def test_ids_outside_the_vocabulary(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    params.validate(11)
    with pytest.raises(RequestError, match=f"{next(iter(values))} holds token id 10, .* ids 0 to 9"):
        params.validate(10)


def test_bad_words_are_encoded_with_and_without_a_blank() -> None:
    codes = {"cat": [5], " cat": [6], "New York": [7, 8], " New York": [9, 8], "same": [3], " same": [3]}
    params = SamplingParams(bad_words=["cat", "New York", "same"], bad_words_ids=[[1, 2]], seed=4)
    resolved = params.with_bad_words(lambda text: codes[text])
    assert resolved.bad_words_ids == ((1, 2), (5,), (6,), (7, 8), (9, 8), (3,))
    assert resolved.bad_words == () and resolved.seed == 4
    plain = SamplingParams()
    assert plain.with_bad_words(lambda text: codes[text]) is plain


def test_mapping() -> None:
    params = SamplingParams.from_mapping({"temperature": 1, "stop": "x", "logit_bias": {"7": -3, 8: 1}, "seed": None})
    assert params == SamplingParams(temperature=1.0, stop=("x",), logit_bias={7: -3.0, 8: 1.0})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature'; did you mean temperature?"),
        ({"max_new_tokens": 1}, "did you mean max_tokens?"),
        ({"zzz": 1}, "known are max_tokens, max_branch_tokens"),
        ({3: 1}, "unknown sampling parameter 3"),
        ([1], "must be a mapping"),
        ({"temperature": None}, "temperature is None"),
        ({"logit_bias": {"x": 1}}, "'x'"),
        ({"logit_bias": {"9" * 5000: 1}}, "a token id in logit_bias"),
    ],
)
def test_bad_mappings(values: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_mapping(values)
    assert says in str(caught.value)


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = (
    SCALAR
    | st.lists(SCALAR | st.lists(SCALAR, max_size=2), max_size=3)
    | st.dictionaries(st.text(max_size=3), SCALAR, max_size=3)
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SamplingParams)]), JSON, max_size=4))
def test_any_json_is_accepted_or_refused(values: dict[str, Any]) -> None:
    try:
        SamplingParams.from_mapping(values).validate(100)
    except RequestError as error:
        assert str(error)
