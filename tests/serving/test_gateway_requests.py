"""What the gateway reads: bodies, OpenAI's fields, and their meaning for the model. No server is needed here."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apar.runtime.serving.gateway.errors import ApiError
from apar.runtime.serving.gateway.json_body import depth, parse
from apar.runtime.serving.gateway.requests import Job, chat_job, completions_job
from apar.runtime.serving.gateway.settings import GatewaySettings
from apar.runtime.serving.model_responses import TritonError, join, read_response
from apar.runtime.serving.triton_stream import encode

SETTINGS = GatewaySettings("tiny", max_context=1024, created=0, deadline=100.0, max_choices=4)
USER = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> Job:
    return chat_job({"model": "tiny", "messages": USER, **fields}, SETTINGS)


def complete(**fields: Any) -> Job:
    return completions_job({"model": "tiny", "prompt": "Hello", **fields}, SETTINGS)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    return caught.value


def json_depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(json_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(json_depth, value), default=0)
    return 0


class TestBody:
    @given(
        st.recursive(
            st.text(alphabet='[]{}"\\a\n') | st.integers(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[{"\\'), inner, max_size=3),
            max_leaves=12,
        )
    )
    def test_depth_is_that_of_the_parsed_value(self, value: Any) -> None:
        assert depth(json.dumps(value).encode(), 1000) == json_depth(value)

    def test_depth_stops_early(self) -> None:
        assert depth(b"[" * 10_000_000, 64) == 65

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"", "not JSON"),
            (b"{", "not JSON"),
            (b"[]", "must be a JSON object"),
            (b'{"a": NaN}', "NaN is no JSON number"),
            (b'{"a": -Infinity}', "-Infinity is no JSON number"),
            (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
            (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        ],
    )
    def test_no_json_object(self, body: bytes, said: str) -> None:
        with pytest.raises(ApiError, match=said) as caught:
            parse(body)
        assert caught.value.status == 400

    def test_lone_surrogate_is_refused_before_it_is_sent(self) -> None:
        job = chat_job({"model": "tiny", "messages": json.loads('[{"role":"user","content":"\\ud800"}]')}, SETTINGS)
        with pytest.raises(TritonError, match="lone surrogate") as caught:
            encode(job.inputs[0])
        assert caught.value.code == "invalid_request"


class TestChat:
    def test_defaults(self) -> None:
        job = chat()
        assert job.inputs == [{"max_tokens": 1024, "timeout_ms": 100_000, "messages": json.dumps(USER)}]
        assert (job.common.stream, job.common.include_usage, job.logprobs) == (False, False, None)

    def test_every_field_reaches_the_model(self) -> None:
        job = chat(
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=5,
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=0.1,
            frequency_penalty=-0.1,
            logit_bias={"12": -5},
            seed=-1,
            stop="END",
            top_k=3,
            min_p=0.1,
            repetition_penalty=1.1,
            min_tokens=2,
            stop_token_ids=[4],
            ignore_eos=True,
            include_stop_str_in_output=True,
            bad_words=["no"],
            max_branch_tokens=9,
            max_branches=3,
            max_depth=4,
            fork=False,
            branch_events=True,
            timeout_ms=2500,
            logprobs=True,
            top_logprobs=2,
            user="u",
            metadata={},
            some_future_field=1,
        )
        assert job.inputs == [
            {
                "max_tokens": 7,
                "temperature": 0.5,
                "top_p": 0.9,
                "presence_penalty": 0.1,
                "frequency_penalty": -0.1,
                "logit_bias": '{"12": -5.0}',
                "seed": 2**64 - 1,
                "stop_words": ["END"],
                "top_k": 3,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "min_tokens": 2,
                "stop_token_ids": [4],
                "ignore_eos": True,
                "include_stop_in_output": True,
                "bad_words": ["no"],
                "max_branch_tokens": 9,
                "max_branches": 3,
                "max_depth": 4,
                "fork": False,
                "timeout_ms": 2500,
                "logprobs": 2,
                "branch_events": True,
                "messages": json.dumps(USER),
            }
        ]
        assert job.common.stream and job.common.include_usage and job.common.branch_events
        assert job.common.deadline == 2.5

    def test_null_is_as_if_absent(self) -> None:
        names = ("stop", "seed", "temperature", "tools", "n", "stream", "stream_options", "logprobs", "response_format")
        assert chat(**dict.fromkeys(names)) == chat()

    def test_what_other_servers_clients_write_for_nothing(self) -> None:
        assert chat(tool_choice="auto", tools=[], function_call="none", stop=[]) == chat()
        assert chat(top_k=-1).inputs[0]["top_k"] == 0

    def test_n_answers_have_seeds_of_their_own(self) -> None:
        assert [inputs["seed"] for inputs in chat(n=3, seed=2**64 - 2).inputs] == [2**64 - 2, 2**64 - 1, 0]
        assert refused(n=5).param == "n"

    def test_roles_and_parts(self) -> None:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        ]
        assert json.loads(chat(messages=messages).inputs[0]["messages"]) == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "ab"},
        ]

    @pytest.mark.parametrize(
        ("fields", "param", "said"),
        [
            ({"messages": []}, "messages", "list of at least one"),
            ({"messages": "hi"}, "messages", "list of at least one"),
            ({"messages": ["hi"]}, "messages[0]", "must be an object"),
            ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "not 'tool'"),
            ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string or a list"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "reads text"),
            ({"tools": [{}]}, "tools", "calls no tools"),
            ({"tool_choice": "required"}, "tool_choice", "demands a call"),
            ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "demands a call"),
            ({"function_call": {"name": "f"}}, "function_call", "demands a call"),
            ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
            ({"response_format": {"type": "json_object"}}, "response_format", "text only"),
            ({"modalities": ["audio"]}, "modalities", "only"),
            ({"temperature": "hot"}, "temperature", "must be a number"),
            ({"temperature": True}, "temperature", "must be a number"),
            ({"top_p": 0}, "top_p", "above 0"),
            ({"stop": ["x"] * 65}, "stop", "at most 64"),
            ({"stop": [""]}, "stop", "1 to 256"),
            ({"stop": 3}, "stop", "list of strings"),
            ({"seed": 2**70}, "seed", "integer from 0"),
            ({"max_tokens": 0}, "max_tokens", "integer from 1"),
            ({"max_tokens": 2**40}, "max_tokens", "integer from 1"),
            ({"n": 0}, "n", "whole number"),
            ({"stream": "yes"}, "stream", "true or false"),
            ({"stream_options": []}, "stream_options", "object"),
            ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
            ({"stream": False, "stream_options": {}}, "stream_options", "only allowed when stream is true"),
            ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
            ({"max_branchs": 2}, "max_branchs", "did you mean max_branches"),
            ({"logit_bias": {"x": 1}}, None, "token id in logit_bias"),
            ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "true or false"),
        ],
    )
    def test_refused(self, fields: dict[str, Any], param: str | None, said: str) -> None:
        error = refused(**fields)
        assert error.status == 400 and error.param == param and said in str(error)
        assert error.body()["error"]["type"] == "invalid_request_error"

    def test_model_must_be_the_one_served(self) -> None:
        error = refused(model="gpt-4o")
        assert (error.status, error.code) == (404, "model_not_found") and "'tiny'" in str(error)
        assert refused(model=None).status == 400


class TestCompletions:
    def test_prompts(self) -> None:
        assert complete().inputs == [{"max_tokens": 16, "timeout_ms": 100_000, "text_input": "Hello", "chat": False}]
        assert [inputs["text_input"] for inputs in complete(prompt=["a", "b"], n=2).inputs] == ["a", "a", "b", "b"]
        assert complete(prompt=["a", "b"], n=2).prompts == 2
        assert complete(prompt=[1, 2]).inputs[0]["input_ids"] == [1, 2]
        assert [inputs["input_ids"] for inputs in complete(prompt=[[1], [2]]).inputs] == [[1], [2]]

    @pytest.mark.parametrize("prompt", [None, [], 3, ["a", 1], [[]], [True], [-1], [[1], "a"]])
    def test_no_prompt(self, prompt: Any) -> None:
        with pytest.raises(ApiError, match="prompt must be"):
            complete(prompt=prompt)

    def test_echo_and_others(self) -> None:
        assert complete(echo=True).echo and not complete().echo
        assert complete(best_of=2, n=2).common.choices == 2
        for fields in ({"echo": True, "logprobs": 1}, {"echo": True, "prompt": [1]}, {"best_of": 2}, {"suffix": "x"}):
            with pytest.raises(ApiError, match=r"not supported|cannot be combined|needs prompts"):
                complete(**fields)


class TestResponses:
    def test_vectors_of_one_element_are_scalars(self) -> None:
        message = {
            "text_output": "x",
            "event": "delta",
            "branch_id": 0,
            "parent_id": -1,
            "depth": 1,
            "event_text": "x",
            "event_tokens": 1,
            "event_step": 7,
        }
        (event,) = read_response(message).events
        assert (event.kind, event.branch_id, event.text, event.tokens, event.step) == ("delta", 0, "x", 1, 7)

    def test_what_comes_together_is_one_response(self) -> None:
        last = {"text_output": "c", "finish_reason": "stop", "completion_tokens": 3}
        (whole,) = join(map(read_response, [{"text_output": "a"}, {"text_output": "b"}, last]))
        assert whole.text == "abc" and whole.final is not None and whole.final.completion_tokens == 3
        found = join(map(read_response, [{"text_output": "a"}, {"text_output": "b"}, {"error": "internal: x"}]))
        assert next(found).text == "ab"
        with pytest.raises(TritonError, match="x"):
            next(found)
        assert not list(join([]))

    @pytest.mark.parametrize(
        ("said", "code", "message"),
        [
            ("overloaded: come back", "overloaded", "come back"),
            ("context_exceeded: too: long", "context_exceeded", "too: long"),
            ("unexpected datatype: INT8", "", "unexpected datatype: INT8"),
        ],
    )
    def test_errors_have_codes(self, said: str, code: str, message: str) -> None:
        with pytest.raises(TritonError) as caught:
            read_response({"error": said})
        assert (caught.value.code, str(caught.value)) == (code, message)
