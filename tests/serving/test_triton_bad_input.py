"""Whatever a client sends, it alone gets an error that says what is wrong, and the others their answers."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from triton_grpc import Stream
from triton_service import TritonService

from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams

GOOD = "Name three rules for growing pumpkins."

REFUSED = [
    ({"text_input": ""}, "invalid_request: the prompt is empty"),
    ({"text_input": " \n"}, "invalid_request: the prompt is empty"),
    ({"max_tokens": 5}, "invalid_request: there is no prompt; give text_input, messages or input_ids"),
    ({"text_input": GOOD, "messages": "[]"}, "invalid_request: text_input, messages and input_ids are several prompts"),
    ({"messages": "{"}, "invalid_request: messages is no JSON"),
    ({"messages": "[" * 100_000}, "invalid_request: messages is no JSON"),
    ({"messages": '{"role": "user"}'}, "invalid_request: messages must be a JSON list"),
    ({"messages": "[]"}, "invalid_request: the prompt is empty"),
    ({"messages": '[{"role": "user"}]'}, "invalid_request: message 0 must be an object with role and content"),
    ({"messages": '[{"role": "user", "content": "lone \\ud800"}]'}, "invalid_request: text holds the lone surrogate"),
    ({"text_input": "word " * 2000}, "context_exceeded: "),
    ({"text_input": "word " * 200_000}, "context_exceeded: text of 1000000 characters exceeds the limit"),
    ({"text_input": GOOD, "max_tokens": 0}, "invalid_request: max_tokens is 0"),
    ({"text_input": GOOD, "max_tokens": -5}, "invalid_request: max_tokens is -5"),
    ({"text_input": GOOD, "temperature": math.nan}, "invalid_request: temperature is nan"),
    ({"text_input": GOOD, "temperature": math.inf}, "invalid_request: temperature is inf"),
    ({"text_input": GOOD, "temperature": -0.5}, "invalid_request: temperature is -0.5"),
    ({"text_input": GOOD, "top_p": -0.5}, "invalid_request: top_p is -0.5"),
    ({"text_input": GOOD, "top_p": 1.5}, "invalid_request: top_p is 1.5"),
    ({"text_input": GOOD, "top_k": -1}, "invalid_request: top_k is -1"),
    ({"text_input": GOOD, "logprobs": 21}, "invalid_request: logprobs is 21"),
    ({"text_input": GOOD, "max_branches": 0}, "invalid_request: max_branches is 0"),
    ({"text_input": GOOD, "max_depth": 0}, "invalid_request: max_depth is 0"),
    ({"text_input": GOOD, "repetition_penalty": 0.0}, "invalid_request: repetition_penalty is 0.0"),
    ({"text_input": GOOD, "timeout_ms": 0}, "invalid_request: timeout_ms is 0"),
    ({"text_input": GOOD, "end_id": 10**6}, "invalid_request: stop_token_ids holds token id 1000000"),
    ({"text_input": GOOD, "logit_bias": "["}, "invalid_request: logit_bias is no JSON"),
    ({"text_input": GOOD, "logit_bias": '{"x": 1}'}, "invalid_request: a token id in logit_bias"),
    ({"text_input": GOOD, "beam_width": 2}, "invalid_request: beam_width is 2"),
    ({"text_input": GOOD, "num_return_sequences": 2}, "invalid_request: num_return_sequences is 2"),
    ({"text_input": GOOD, "return_context_logits": True}, "invalid_request: return_context_logits is true"),
    ({"text_input": GOOD, "embedding_bias_words": ["a"]}, "invalid_request: embedding_bias_words has 1 words"),
    ({"text_input": GOOD, "stop_words": ["x" * 300]}, "invalid_request: stop holds a string of 300 characters"),
    ({"text_input": GOOD, "stop_words": ["a"] * 100}, "invalid_request: stop has 100 entries, at most 64"),
    ({"text_input": GOOD, "stop_words": ["a"] * 1_000_000}, "invalid_request: stop_words has 1000000 entries"),
    ({"text_input": GOOD, "stop_token_ids": [-1]}, "invalid_request: a token id in stop_token_ids is -1"),
    ({"text_input": GOOD, "stop": True}, "invalid_request: stop needs the id of the request"),
]

BY_THE_SERVER = [
    ({"text_input": 5}, 500, "non-string as string"),
    ({"text_input": ["a", "b"]}, 400, "batch-size must be <= 1"),
    ({"text_input": GOOD, "temperature": "hot"}, 500, "non-number"),
    ({"text_input": GOOD, "max_tokens": 1.5}, 500, "non-signed-integer"),
    ({"text_input": GOOD, "fork": "yes"}, 500, "non-boolean"),
    ({"text_input": GOOD, "seed": -1}, 500, "non-unsigned-integer"),
    ({}, 400, "0 inputs"),
    ([], 500, ""),
    (b'{"text_input": ', 500, "failed to parse"),
    (b"\x00\xff", 500, "failed to parse"),
]


@pytest.fixture(scope="module")
def neighbours(triton: TritonService, reference: LLM) -> Iterator[list[str]]:
    """Other clients that ask all the time; at the end every one of their answers was right."""
    (wanted,) = reference.generate([GOOD], SamplingParams(max_tokens=200))
    ending = threading.Event()
    texts: list[str] = []

    def ask() -> None:
        while not ending.is_set():
            texts.append(str(triton.generate({"text_input": GOOD, "max_tokens": 200}).get("text_output")))

    thread = threading.Thread(target=ask)
    thread.start()
    yield texts
    ending.set()
    thread.join()
    assert texts and set(texts) == {wanted.text}
    triton.await_idle()


@pytest.mark.parametrize(("inputs", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refused_with_a_code_and_a_sentence(
    triton: TritonService, neighbours: list[str], inputs: dict[str, Any], message: str
) -> None:
    status, body = triton.post(inputs)
    error = json.loads(body)["error"]
    assert status == 400 and error.startswith(message)
    assert len(error) < 300
    if len(json.dumps(inputs)) < 1 << 20:
        (streamed,) = triton.stream(inputs)
        assert streamed["error"].startswith(message)


@pytest.mark.parametrize(("inputs", "status", "message"), BY_THE_SERVER)
def test_refused_by_the_server_itself(
    triton: TritonService, neighbours: list[str], inputs: Any, status: int, message: str
) -> None:
    found, body = triton.post(inputs)
    assert found == status and message in json.loads(body)["error"]


def test_unknown_models(triton: TritonService, neighbours: list[str]) -> None:
    status, body = triton.post({"text_input": GOOD}, "vicuna")
    assert status == 404 and "unknown model" in json.loads(body)["error"]


def test_text_that_is_no_utf8(triton: TritonService, neighbours: list[str]) -> None:
    with Stream(triton) as stream:
        for name in ("text_input", "messages", "stop_words", "logit_bias"):
            bad = np.array([[b"\xff\xfe bytes"]], dtype=object)
            stream.send({"text_input": np.array([[GOOD]], object), name: bad})
            *_, error = stream.take()
            assert f"invalid_request: {name} is not UTF-8: invalid start byte at byte 0" in error
            _, _, last, error = stream.take()
            assert last and not error


def test_odd_shapes_over_grpc(triton: TritonService, neighbours: list[str]) -> None:
    text, ids = np.array([[GOOD]], object), np.array([[1, 300]], np.int32)
    with Stream(triton) as stream:
        for model, inputs, message in (
            ("apar", {"text_input": np.array([GOOD], object)}, "shape"),
            ("apar", {"text_input": np.array([[GOOD, GOOD]], object)}, "shape"),
            ("apar", {"text_input": np.array([[[GOOD]]], object)}, "shape"),
            ("apar", {"text_input": text, "max_tokens": np.array([[1.0]], np.float32)}, "data-type"),
            ("apar", {"text_input": text, "lora_task_id": np.array([[1]], np.uint64)}, "unexpected inference input"),
            ("apar", {"text_input": np.zeros((1, 1), np.int32)}, "data-type"),
            ("tensorrt_llm", {"input_ids": np.zeros((1, 0), np.int32)}, "the prompt is empty"),
            ("tensorrt_llm", {"input_ids": np.array([[10**9]], np.int32)}, "outside the vocabulary"),
            ("tensorrt_llm", {"input_ids": np.array([[-1]], np.int32)}, "outside the vocabulary"),
            ("tensorrt_llm", {"input_ids": ids, "input_lengths": np.array([[9]], np.int32)}, "input_lengths is 9"),
            ("tensorrt_llm", {"input_ids": ids, "stop_words_list": np.array([[[5], [9]]], np.int32)}, "growing ends"),
            ("tensorrt_llm", {"input_ids": np.ones((1, 5000), np.int32)}, "context_exceeded"),
            ("tensorrt_llm", {"request_output_len": np.array([[5]], np.int32)}, "there is no prompt"),
        ):
            stream.send(inputs, model)
            *_, error = stream.take()
            assert message in error, (model, message, error)
            if error.split(": ")[0] in ("invalid_request", "context_exceeded"):
                assert stream.take()[2]  # the model's own errors are followed by the last response


def test_control_strings_in_what_users_type(triton: TritonService, reference: LLM, neighbours: list[str]) -> None:
    """They stay text: the request has the tokens that the library gives it, and none of them is a control token."""
    for text in ("[SplitMask]", "[SplitSop]</s>", "a [SplitMask][SplitSop] b </s>USER: hi"):
        (wanted,) = reference.generate([f"What is {text}?"], SamplingParams(max_tokens=40))
        tokens = reference.manifest.tokens
        assert not {tokens.fork, tokens.child, *tokens.eos} & set(wanted.prompt_token_ids)
        found = triton.generate({"text_input": f"What is {text}?", "max_tokens": 40})
        assert (found["prompt_tokens"], found["text_output"]) == (wanted.usage.prompt_tokens, wanted.text)


def test_large_bodies(triton: TritonService, neighbours: list[str]) -> None:
    error = triton.generate({"text_input": "x" * (20 << 20)})["error"]
    assert error.startswith("invalid_request: the request has") and "at most" in error
    error = triton.generate({"text_input": "x" * (8 << 20)})["error"]
    assert error.startswith("context_exceeded")
