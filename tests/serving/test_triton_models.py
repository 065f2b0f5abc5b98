"""The models of the repository on a real server, asked with tritonclient and over HTTP."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from triton_grpc import Stream, text_of
from triton_service import TritonService, in_threads

from apar.runtime.llm import LLM
from apar.runtime.metrics import SAMPLE_SIZE
from apar.runtime.outputs import RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.text import assemble

TEXT_MODELS = ["apar", "ensemble", "tensorrt_llm_bls"]
MAX_TOKENS = 300


def expected(reference: LLM, questions: list[str], **values: Any) -> list[RequestOutput]:
    return reference.generate(questions, SamplingParams(max_tokens=MAX_TOKENS, **values))


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_the_text_is_that_of_the_library(
    triton: TritonService, reference: LLM, questions: list[str], model: str
) -> None:
    wanted = expected(reference, questions[:2])
    for question, output in zip(questions, wanted, strict=False):
        inputs = {"text_input": question, "max_tokens": MAX_TOKENS}
        whole = triton.generate(inputs, model)
        assert whole["text_output"] == output.text
        assert whole["finish_reason"] == "stop"
        assert whole["completion_tokens"] == output.usage.completion_tokens
        assert whole["prompt_tokens"] == output.usage.prompt_tokens
        assert (whole["branches"], whole["steps"]) == (len(output.branches), output.timing.steps)
        parts = list(triton.stream(inputs, model))
        assert "".join(part["text_output"] for part in parts) == output.text
        assert ["finish_reason" in part for part in parts] == [False] * (len(parts) - 1) + [True]
        with Stream(triton) as stream:
            stream.send({"text_input": [[question]], "max_tokens": [[np.int32(MAX_TOKENS)]], "stream": [[True]]}, model)
            assert text_of(stream.answer()) == output.text


def test_32_in_flight_do_not_disturb_each_other(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    asked = questions[:32]
    wanted = [output.text for output in expected(reference, asked)]

    def ask(index: int) -> str:
        parts = triton.stream({"text_input": asked[index], "max_tokens": MAX_TOKENS})
        return "".join(part["text_output"] for part in parts)

    assert in_threads(len(asked), ask) == wanted
    triton.await_idle()


def test_32_on_one_grpc_stream(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    asked = questions[:32]
    wanted = [output.text for output in expected(reference, asked)]
    texts, finals = [""] * len(asked), [0] * len(asked)
    with Stream(triton) as stream:
        for index, question in enumerate(asked):
            inputs = {"text_input": [[question]], "max_tokens": np.array([[MAX_TOKENS]], np.int32), "stream": [[True]]}
            stream.send(inputs, request_id=str(index))
        while sum(finals) < len(asked):
            number, result, last, error = stream.take()
            assert not error
            texts[int(number)] += text_of([result])
            finals[int(number)] += last
    assert texts == wanted and finals == [1] * len(asked)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("stream", [True, False])
def test_branch_events_rebuild_the_tree(
    triton: TritonService, reference: LLM, questions: list[str], stream: bool
) -> None:
    (wanted,) = expected(reference, questions[:1])
    inputs = {"text_input": questions[0], "max_tokens": MAX_TOKENS, "branch_events": True, "stream": stream}
    parts = list(triton.stream(inputs))
    assert len(parts) > 1 if stream else len(parts) == 1
    names = ("event", "branch_id", "parent_id", "depth", "event_text", "event_tokens", "event_step")
    rows = [
        row for part in parts if "event" in part for row in zip(*(as_list(part[name]) for name in names), strict=True)
    ]
    segments: dict[int, list[str]] = {0: [""]}
    children: dict[int, list[int]] = {0: []}
    tokens = {0: 0}
    reasons: dict[int, str] = {}
    steps: dict[int, int] = {}
    for kind, branch, parent, depth, text, count, step in rows:
        assert branch not in reasons, "nothing follows the end of a branch"
        assert parent == (wanted.branches[branch].parent_id if branch else -1)
        assert depth == wanted.branches[branch].depth
        assert step >= steps.get(branch, 0)
        steps[branch] = step
        if kind == "fork":
            children[parent].append(branch)
            segments[parent].append("")
            segments[branch], children[branch], tokens[branch] = [""], [], 0
        elif kind == "delta":
            segments[branch][-1] += text
            tokens[branch] += count
        else:
            reasons[branch] = text
    for branch in wanted.branches:
        assert segments[branch.branch_id] == branch.segments
        assert children[branch.branch_id] == branch.children
        assert tokens[branch.branch_id] == len(branch.token_ids)
        assert reasons[branch.branch_id] == branch.finish_reason
        # Steps are counted over all requests, so only their differences are known.
        assert steps[branch.branch_id] - steps[0] == branch.last_step - wanted.branches[0].last_step
    assert "".join(part["text_output"] for part in parts) == assemble(wanted.branches)


def test_no_forks(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    (wanted,) = expected(reference, questions[:1], fork=False)
    found = triton.generate({"text_input": questions[0], "max_tokens": MAX_TOKENS, "fork": False})
    assert (found["text_output"], found["branches"]) == (wanted.text, 1)
    limited = triton.generate({"text_input": questions[0], "max_tokens": MAX_TOKENS, "max_depth": 1})
    assert limited["branches"] == 1


def test_messages_and_plain_text(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    messages = [
        {"role": "user", "content": questions[0]},
        {"role": "assistant", "content": "Here is one."},
        {"role": "user", "content": questions[1]},
    ]
    params = SamplingParams(max_tokens=60)
    (wanted,) = reference.generate([messages], params)
    found = triton.generate({"messages": json.dumps(messages), "max_tokens": 60})
    assert (found["text_output"], found["prompt_tokens"]) == (wanted.text, wanted.usage.prompt_tokens)
    (wanted,) = reference.generate(["Once upon a time"], params, chat=False)
    found = triton.generate({"text_input": "Once upon a time", "chat": False, "max_tokens": 60})
    assert (found["text_output"], found["prompt_tokens"]) == (wanted.text, wanted.usage.prompt_tokens)
    echo = triton.generate(
        {"text_input": "Once upon a time", "chat": False, "max_tokens": 60, "exclude_input_in_output": False}
    )
    assert echo["text_output"] == "Once upon a time" + wanted.text


def test_sampling_parameters_mean_the_same(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "seed": 2**63 + 1}
    (wanted,) = expected(reference, questions[:1], **values)
    found = triton.generate({"text_input": questions[0], "max_tokens": MAX_TOKENS, **values})
    assert (found["text_output"], found["seed"]) == (wanted.text, 2**63 + 1)
    old_names = {**values, "random_seed": values["seed"]}
    del old_names["seed"]
    assert triton.generate({"text_input": questions[0], "max_tokens": MAX_TOKENS, **old_names})["text_output"] == (
        wanted.text
    )


def test_stop_words_bad_words_and_biases(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    question = questions[0]
    (whole,) = expected(reference, [question])
    word = whole.branches[1].segments[0].split()[3]
    (wanted,) = expected(reference, [question], stop=[word])
    found = triton.generate({"text_input": question, "max_tokens": MAX_TOKENS, "stop_words": [word, ""]})
    assert found["text_output"] == wanted.text != whole.text
    (wanted,) = expected(reference, [question], bad_words=[word])
    found = triton.generate({"text_input": question, "max_tokens": MAX_TOKENS, "bad_words": [word]})
    assert found["text_output"] == wanted.text != whole.text
    bias = dict.fromkeys(reference.tokenizer.encode_text(word), -100.0)
    (wanted,) = expected(reference, [question], logit_bias=bias)
    for inputs in (
        {"logit_bias": json.dumps(bias)},
        {"embedding_bias_words": [word], "embedding_bias_weights": [-100.0]},
    ):
        found = triton.generate({"text_input": question, "max_tokens": MAX_TOKENS, **inputs})
        assert found["text_output"] == wanted.text


@pytest.mark.parametrize("stream", [True, False])
def test_log_probs(triton: TritonService, reference: LLM, questions: list[str], stream: bool) -> None:
    (wanted,) = expected(reference, questions[:1], logprobs=2)
    inputs = {"text_input": questions[0], "max_tokens": MAX_TOKENS, "logprobs": 2, "return_log_probs": True}
    parts = list(triton.stream({**inputs, "stream": stream}))
    entries = [entry for part in parts if "logprobs" in part for entry in json.loads(part["logprobs"])]
    numbers = [value for part in parts if "output_log_probs" in part for value in as_list(part["output_log_probs"])]
    for branch in wanted.branches:
        mine = [entry for entry in entries if entry["branch_id"] == branch.branch_id]
        assert [entry["token_id"] for entry in mine] == branch.token_ids
        assert branch.logprobs is not None
        for entry, logprob in zip(mine, branch.logprobs, strict=True):
            assert entry["logprob"] == pytest.approx(logprob.logprob, abs=1e-5)
            assert [top["token_id"] for top in entry["top"]] == [token for token, _ in logprob.top]
            assert bytes(entry["bytes"]) == reference.tokenizer.token_bytes(entry["token_id"])
    assert numbers == pytest.approx([entry["logprob"] for entry in entries], abs=1e-5)
    assert parts[-1]["cum_log_probs"] == pytest.approx(sum(numbers), abs=1e-4)


def test_token_ids(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    prompt = reference.generate(questions[0], SamplingParams(max_tokens=1))[0].prompt_token_ids
    (plain,) = reference.generate([prompt], SamplingParams(max_tokens=MAX_TOKENS, fork=False))
    inputs = {"input_ids": [*prompt, 7, 7], "input_lengths": len(prompt), "request_output_len": MAX_TOKENS}
    found = triton.generate({**inputs, "fork": False}, "tensorrt_llm")
    assert found["output_ids"] == plain.branches[0].token_ids
    assert found["sequence_length"] == len(plain.branches[0].token_ids)
    parts = list(triton.stream({**inputs, "fork": False}, "tensorrt_llm"))
    assert [i for part in parts for i in as_list(part.get("output_ids", []))] == plain.branches[0].token_ids
    echo = triton.generate({**inputs, "fork": False, "exclude_input_in_output": False}, "tensorrt_llm")
    assert echo["output_ids"] == prompt + plain.branches[0].token_ids

    (forked,) = reference.generate([prompt], SamplingParams(max_tokens=MAX_TOKENS))
    parts = list(triton.stream({**inputs, "branch_events": True}, "tensorrt_llm"))
    ids = [i for part in parts for i in as_list(part.get("output_ids", []))]
    assert ids == reading_order(forked, reference.manifest.tokens.fork)
    assert not {reference.manifest.tokens.fork, reference.manifest.tokens.child} & set(ids)
    own: dict[int, list[int]] = {branch.branch_id: [] for branch in forked.branches}
    for part in parts:
        flat = as_list(part.get("event_ids", []))
        for branch, count in zip(
            as_list(part.get("branch_id", [])), as_list(part.get("event_tokens", [])), strict=True
        ):
            own[branch] += flat[:count]
            del flat[:count]
    assert own == {branch.branch_id: branch.token_ids for branch in forked.branches}


def reading_order(output: RequestOutput, fork: int, branch: int = 0) -> list[int]:
    """Tokens of a branch with those of its children where it forked, without the control tokens."""
    children = iter(output.branches[branch].children)
    found: list[int] = []
    for token in output.branches[branch].token_ids:
        found += reading_order(output, fork, next(children)) if token == fork else [token]
    return found


def test_stop_and_bad_words_as_ids(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    whole = reference.generate(questions[0], SamplingParams(max_tokens=60, fork=False))[0]
    prompt, ids = whole.prompt_token_ids, whole.branches[0].token_ids
    inputs = {"input_ids": np.array([prompt], np.int32), "request_output_len": np.array([[60]], np.int32)}

    def ask(name: str, words: list[list[int]]) -> list[int]:
        with Stream(triton) as stream:
            stream.send({**inputs, "fork": [[False]], name: np.array([words], np.int32)}, "tensorrt_llm")
            (result,) = stream.answer()
        found: list[int] = result.as_numpy("output_ids")[0][0].tolist()
        return found

    assert ask("stop_words_list", [[ids[5]], [1]]) == ids[: ids.index(ids[5])]
    pair = ids[7:9]  # a sequence of several tokens ends the answer where it is complete
    assert ask("stop_words_list", [[*pair, 999], [2, 3, -1]]) == ids[:9]
    banned = [[ids[4], ids[5]], [ids[8]]]
    (wanted,) = reference.generate([prompt], SamplingParams(max_tokens=60, fork=False, bad_words_ids=banned))
    assert ask("bad_words_list", [[*banned[0], *banned[1]], [2, 3, -1]]) == wanted.branches[0].token_ids != ids


def test_a_payload_of_tensorrtllm_backend(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    """What inflight_batcher_llm/client/end_to_end_grpc_client.py sends (v0.16), and how it reads the answer."""
    (wanted,) = expected(reference, questions[:1])
    inputs = {
        "text_input": np.array([[questions[0]]]).astype(object),
        "max_tokens": np.array([[MAX_TOKENS]], np.int32),
        "stream": np.array([[True]]),
        "beam_width": np.array([[1]], np.int32),
        "temperature": np.array([[1.0]], np.float32),
        "top_k": np.array([[1]], np.int32),
        "num_return_sequences": np.array([[1]], np.int32),
        "bad_words": np.array([[""]], dtype=object),
        "stop_words": np.array([[""]], dtype=object),
        "repetition_penalty": np.array([[1.0]], np.float32),
        "presence_penalty": np.array([[0.0]], np.float32),
        "frequency_penalty": np.array([[0.0]], np.float32),
        "return_log_probs": np.array([[True]]),
        "end_id": np.array([[reference.manifest.tokens.eos[0]]], np.int32),
        "pad_id": np.array([[50256]], np.int32),
        "exclude_input_in_output": np.array([[True]]),
        "random_seed": np.array([[42]], np.uint64),
        "return_context_logits": np.array([[False]]),
    }
    outputs = [grpcclient.InferRequestedOutput(name) for name in ("text_output", "cum_log_probs", "output_log_probs")]
    for model in TEXT_MODELS:
        with Stream(triton) as stream:
            stream.send(inputs, model, request_id="1", outputs=outputs)
            results = stream.answer()
        assert text_of(results) == wanted.text
        shapes = {result.as_numpy("output_log_probs").shape[:2] for result in results}
        assert shapes == {(1, 1)}


@pytest.mark.parametrize(("top_k", "greedy"), [(1, True), (0, True), (50, False)])
def test_a_top_p_of_0_is_none(
    triton: TritonService, reference: LLM, questions: list[str], top_k: int, greedy: bool
) -> None:
    """inflight_batcher_llm_client.py of tensorrtllm_backend sends runtime_top_p 0 unless it is told another."""
    prompt = reference.generate(questions[0], SamplingParams(max_tokens=1))[0].prompt_token_ids
    sampling = SamplingParams(max_tokens=40, fork=False, temperature=1.5, seed=3, top_k=1 if greedy else top_k)
    (wanted,) = reference.generate([prompt], sampling)
    inputs = {
        "input_ids": np.array([prompt], np.int32),
        "input_lengths": np.array([[len(prompt)]], np.int32),
        "request_output_len": np.array([[40]], np.int32),
        "beam_width": np.array([[1]], np.int32),
        "temperature": np.array([[1.5]], np.float32),
        "streaming": np.array([[False]]),
        "end_id": np.array([[reference.manifest.tokens.eos[0]]], np.int32),
        "pad_id": np.array([[0]], np.int32),
        "runtime_top_k": np.array([[top_k]], np.int32),
        "runtime_top_p": np.array([[0.0]], np.float32),
        "random_seed": np.array([[3]], np.uint64),
        "fork": np.array([[False]]),
    }
    with Stream(triton) as stream:
        stream.send(inputs, "tensorrt_llm", request_id="1")
        (result,) = stream.answer()
    assert result.as_numpy("output_ids")[0][0].tolist() == wanted.branches[0].token_ids


def test_metrics_count_what_happened(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    before = triton.await_idle()
    wanted = expected(reference, questions[:3])
    steps = sum(o.timing.steps - 1 for o in wanted)
    assert steps <= SAMPLE_SIZE, "every time between tokens is kept, though all are counted in one report"
    for question in questions[:3]:
        triton.generate({"text_input": question, "max_tokens": MAX_TOKENS})
    triton.generate({"text_input": questions[0], "temperature": -1.0})
    after = triton.await_numbers()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown['apar:request_finished_total{reason="stop"}'] == 3
    assert grown['apar:request_errors_total{code="invalid_request"}'] == 1
    assert grown["apar:generation_tokens_total"] == sum(o.usage.completion_tokens for o in wanted)
    assert grown["apar:prompt_tokens_total"] == sum(o.usage.prompt_tokens for o in wanted)
    assert grown["apar:prefix_cache_queries_total"] == grown["apar:prompt_tokens_total"]
    assert 0 < grown["apar:prefix_cache_hits_total"] < grown["apar:prompt_tokens_total"]
    assert grown["apar:forks_total"] == sum(len(o.branches) - 1 for o in wanted)
    assert grown["apar:branch_depth_count"] == sum(len(o.branches) for o in wanted)
    assert grown["apar:branch_depth_sum"] == sum(b.depth for o in wanted for b in o.branches)
    assert grown["apar:time_to_first_token_seconds_count"] == 3
    assert grown["apar:e2e_request_latency_seconds_count"] == 3
    assert grown["apar:inter_token_latency_seconds_count"] == steps
    assert after["apar:engine_ready"] == 1 and after["apar:kv_blocks_total"] > 0


def test_a_page_with_an_end_has_all_that_belongs_to_it(triton: TritonService, questions: list[str]) -> None:
    """Whenever the page is read, also while it is being written."""
    before = triton.await_idle()
    pages = [before]
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            pages.append(triton.metrics())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(120):
            triton.generate({"text_input": questions[number % 7], "max_tokens": 2})
        triton.await_numbers()
    finally:
        ended.set()
        reader.join()
    pages.append(triton.metrics())
    counts = ["branch_depth_count", "e2e_request_latency_seconds_count", "time_to_first_token_seconds_count"]
    for page in pages:
        grown = {name: value - before.get(name, 0.0) for name, value in page.items()}
        finished = sum(value for name, value in grown.items() if name.startswith("apar:request_finished_total"))
        assert all(grown.get(f"apar:{name}", 0) >= finished for name in counts)
        assert grown["apar:generation_tokens_total"] >= 2 * finished
    assert finished == 120 and len({page["apar:numbers_timestamp_seconds"] for page in pages}) > 1
