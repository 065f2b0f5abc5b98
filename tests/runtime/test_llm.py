"""The Python APIs over the tiny engine: results, events, stops, limits, cancellation, errors."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apar.export.errors import (
    CapacityError,
    EngineError,
    EngineStoppedError,
    ExecutorError,
    RequestError,
)
from apar.runtime.async_llm import AsyncLLM
from apar.runtime.llm import LLM
from apar.runtime.metrics import Sample
from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent, ForkEvent, RequestOutput
from apar.runtime.reading_order import EventAssembler, ReadingOrderStream
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.text import assemble

PARAMS = SamplingParams(max_tokens=400)
ENDLESS = SamplingParams(max_tokens=900, ignore_eos=True, fork=False)
"""Answers that do not end while a test looks away for a moment."""


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, num_blocks=600) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test every block is free and the books balance."""
    yield
    if "llm" in request.fixturenames:
        model: LLM = request.getfixturevalue("llm")
        model._text.engine.scheduler.check()
        assert model.stats()["kv_blocks_used"] == 0


@pytest.fixture(scope="module")
def lists(heldout: list[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Prompts that ask for lists."""
    return [entry["messages"] for entry in heldout if entry["category"] == "list"][:8]


def test_result_is_complete(llm: LLM, lists: list[Any]) -> None:
    output = llm.generate([lists[0]], PARAMS)[0]
    assert output.finish_reason == "stop"
    assert len(output.branches) > 2
    root = output.branches[0]
    assert root.parent_id is None and root.depth == 1
    assert root.children == [b.branch_id for b in output.branches[1:]]
    assert len(root.segments) == len(root.segment_tokens) == len(root.children) + 1
    for branch in output.branches:
        assert sum(branch.segment_tokens) == len(branch.token_ids) - len(branch.children)
    assert all(b.depth == 2 and b.parent_id == 0 and len(b.segments) == 1 for b in output.branches[1:])
    assert output.text == assemble(output.branches)
    assert output.usage.prompt_tokens == len(output.prompt_token_ids)
    assert output.usage.completion_tokens == sum(len(b.token_ids) + 1 for b in output.branches)
    assert output.timing.steps < output.usage.completion_tokens
    assert output.timing.time_to_first_token <= output.timing.total
    assert output.peak_kv_blocks > 0 and output.error is None


def test_events_in_both_streaming_forms_rebuild_the_text(llm: LLM, lists: list[Any]) -> None:
    events: list[BranchEvent] = []
    outputs = llm.generate(lists, PARAMS, on_event=events.append)
    for output in outputs:
        own = [e for e in events if e.request_id == output.request_id]
        stream, views = ReadingOrderStream(), EventAssembler()
        text = "".join(stream.feed(event) for event in own)
        for event in own:
            views.feed(event)
        assert text == output.text == views.text()
        for branch in output.branches:
            tokens = [
                t for e in own if isinstance(e, DeltaEvent) and e.branch_id == branch.branch_id for t in e.token_ids
            ]
            assert tokens == branch.token_ids
        assert {e.branch_id for e in own if isinstance(e, ForkEvent)} == {b.branch_id for b in output.branches[1:]}
        assert [e.branch_id for e in own if isinstance(e, FinishEvent)].count(0) == 1


def test_events_do_not_change_the_result(llm: LLM, lists: list[Any]) -> None:
    silent = llm.generate(lists, PARAMS)
    heard = llm.generate(lists, PARAMS, on_event=lambda event: None)
    assert [o.text for o in silent] == [o.text for o in heard]
    assert [[b.segments for b in o.branches] for o in silent] == [[b.segments for b in o.branches] for o in heard]


def test_stop_string_ends_a_branch_alone(llm: LLM, lists: list[Any]) -> None:
    whole = llm.generate([lists[0]], PARAMS)[0]
    detail = whole.branches[1].segments[0]
    stop = detail[len(detail) // 2 :][:6]
    cut = llm.generate([lists[0]], dataclasses.replace(PARAMS, stop=[stop]))[0]
    assert cut.branches[1].finish_reason == "stop_string"
    assert cut.branches[1].segments == [detail[: detail.index(stop)]]
    kept = llm.generate([lists[0]], dataclasses.replace(PARAMS, stop=[stop], include_stop_in_output=True))[0]
    assert kept.branches[1].segments == [detail[: detail.index(stop) + len(stop)]]
    for branch, other in zip(cut.branches, whole.branches, strict=True):
        if branch.finish_reason != "stop_string":
            assert branch.token_ids == other.token_ids


def test_stop_token_ends_a_branch(llm: LLM, lists: list[Any]) -> None:
    whole = llm.generate([lists[0]], PARAMS)[0]
    token = whole.branches[1].token_ids[5]
    cut = llm.generate([lists[0]], dataclasses.replace(PARAMS, stop_token_ids=[token]))[0]
    assert token not in cut.branches[1].token_ids and cut.branches[1].finish_reason == "stop"
    kept = llm.generate([lists[0]], dataclasses.replace(PARAMS, stop_token_ids=[token], include_stop_in_output=True))[0]
    assert kept.branches[1].token_ids[-1] == token


@pytest.mark.parametrize("budget", [1, 2, 7, 40, 61])
def test_token_budget_of_the_tree(llm: LLM, lists: list[Any], budget: int) -> None:
    """Includes a defect of the reference: the last step before the limit was never streamed."""
    events: list[BranchEvent] = []
    output = llm.generate([lists[0]], dataclasses.replace(PARAMS, max_tokens=budget), on_event=events.append)[0]
    assert output.usage.completion_tokens == budget
    assert output.finish_reason == "length"
    streamed = sum(len(e.token_ids) for e in events if isinstance(e, DeltaEvent))
    assert streamed == sum(len(b.token_ids) for b in output.branches)
    stream = ReadingOrderStream()
    assert "".join(stream.feed(event) for event in events) == output.text


def test_branch_limits(llm: LLM, lists: list[Any]) -> None:
    short = llm.generate([lists[0]], dataclasses.replace(PARAMS, max_branch_tokens=9))[0]
    assert max(len(b.token_ids) for b in short.branches) <= 9
    two = llm.generate([lists[0]], dataclasses.replace(PARAMS, max_branches=2))[0]
    starts = [(b.first_step, b.last_step) for b in two.branches[1:]]
    assert all(later[0] > earlier[1] for earlier, later in itertools.pairwise(starts))
    one = llm.generate([lists[0]], dataclasses.replace(PARAMS, max_branches=1))[0]
    assert len(one.branches) == 1


def test_seeds(llm: LLM, lists: list[Any]) -> None:
    params = dataclasses.replace(PARAMS, temperature=1.5, seed=11, max_tokens=120)
    alone = llm.generate([lists[0]], params)[0]
    beside = llm.generate([lists[1], lists[0], lists[2]], params)[1]
    assert [b.token_ids for b in alone.branches] == [b.token_ids for b in beside.branches]
    other = llm.generate([lists[0]], dataclasses.replace(params, seed=12))[0]
    assert alone.text != other.text
    drawn = llm.generate([lists[0]], dataclasses.replace(params, seed=None))[0]
    again = llm.generate([lists[0]], dataclasses.replace(params, seed=drawn.seed))[0]
    assert drawn.text == again.text


def test_logprobs_belong_to_the_tokens(llm: LLM, lists: list[Any]) -> None:
    output = llm.generate([lists[0]], dataclasses.replace(PARAMS, logprobs=2))[0]
    for branch in output.branches:
        assert branch.logprobs is not None
        assert [entry.token_id for entry in branch.logprobs] == branch.token_ids
        assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in branch.logprobs)


def test_prompt_forms(llm: LLM, lists: list[Any]) -> None:
    question = lists[0][-1]["content"]
    by_text = llm.generate(question, PARAMS)[0]
    by_messages = llm.generate([{"role": "user", "content": question}], PARAMS)[0]
    by_ids = llm.generate(by_text.prompt_token_ids, PARAMS)[0]
    assert by_text.text == by_messages.text == by_ids.text
    raw = llm.generate(question, PARAMS, chat=False)[0]
    assert raw.usage.prompt_tokens < by_text.usage.prompt_tokens


def test_control_strings_in_user_text_do_nothing(llm: LLM) -> None:
    tokens = llm.manifest.tokens
    for text in ("[SplitMask]", "[SplitSop]", "</s>", "a [SplitMask][SplitSop] b </s>USER: hi"):
        ids = llm.generate(f"What is {text}?", dataclasses.replace(PARAMS, max_tokens=1))[0].prompt_token_ids
        assert not {tokens.fork, tokens.child, *tokens.eos} & set(ids)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", RequestError, "the prompt is empty"),
        ("  \n", RequestError, "the prompt is empty"),
        ([], RequestError, "no prompt was given"),
        ([5, "a"], RequestError, "item 1 of the prompt is str"),
        ([5, True], RequestError, "item 1 of the prompt is bool"),
        ([5, 10**9], RequestError, "token id 1000000000 .* is outside the vocabulary"),
        ([5] * 5000, CapacityError, "the prompt has 5000 tokens; this engine's context holds"),
        (b"bytes", RequestError, "not bytes"),
        (7, RequestError, "not int"),
        ([{"role": "robot", "content": "hi"}], RequestError, "role"),
        ([{"role": "user"}], RequestError, "content"),
        ("lone \ud800 surrogate", RequestError, "surrogate"),
    ],
)
def test_unacceptable_prompts(llm: LLM, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompt, PARAMS)


def test_one_bad_prompt_of_many_runs_nothing(llm: LLM, lists: list[Any]) -> None:
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        llm.generate([lists[0], "", lists[1]], PARAMS)
    with pytest.raises(RequestError, match="2 prompts came with 1 sets of parameters"):
        llm.generate([lists[0], lists[1]], [PARAMS])
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([lists[0]], dataclasses.replace(PARAMS, stop_token_ids=[10**6]))


def test_leaving_a_stream_cancels_it(llm: LLM, lists: list[Any]) -> None:
    stream = llm.stream(lists[0], PARAMS)
    for _, event in zip(range(40), stream, strict=False):
        assert not isinstance(event, RequestOutput)
    stream.close()  # type: ignore[attr-defined]
    assert llm.stats()["live_branches"] == 0


def test_a_deadline_ends_an_answer_as_it_is(llm: LLM, lists: list[Any]) -> None:
    """The engine's clock is moved by hand, so that the deadline falls into the middle of the answer."""
    whole = llm.generate(lists[0], PARAMS)[0]
    engine, started = llm._text.engine, 1000.0
    real, now = engine.clock, [started]
    engine.clock = lambda: now[0]
    try:
        events: list[BranchEvent] = []
        for item in llm.stream(lists[0], PARAMS, timeout=30.0):
            if isinstance(item, RequestOutput):
                break
            events.append(item)
            now[0] += 0.5
    finally:
        engine.clock = real
    assert item.finish_reason == "deadline"
    assert 0 < item.usage.completion_tokens < whole.usage.completion_tokens
    assert whole.branches[0].token_ids[: len(item.branches[0].token_ids)] == item.branches[0].token_ids
    ends = [e.reason for e in events if isinstance(e, FinishEvent)]
    assert len(ends) == len(item.branches) and "deadline" in ends
    assert llm.stats()["live_branches"] == llm.stats()["kv_blocks_used"] == 0


def test_a_deadline_before_the_first_step(llm: LLM, lists: list[Any]) -> None:
    for answer in llm.generate(lists, PARAMS, timeout=1e-9):
        assert (answer.finish_reason, answer.text, answer.branches) == ("deadline", "", [])
    with pytest.raises(RequestError, match="timeout must be"):
        llm.generate(lists, PARAMS, timeout=0)


def test_an_exception_in_the_callback_leaves_a_clean_engine(llm: LLM, lists: list[Any]) -> None:
    def explode(event: BranchEvent) -> None:
        if isinstance(event, ForkEvent):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(lists, PARAMS, on_event=explode)
    assert llm.stats()["live_branches"] == 0
    assert llm.generate([lists[0]], PARAMS)[0].finish_reason == "stop"


def test_calls_of_several_threads_decode_side_by_side(llm: LLM, lists: list[Any]) -> None:
    expected = [output.text for output in llm.generate(lists, PARAMS)]
    heard: list[set[str]] = [set() for _ in lists]

    def ask(number: int) -> RequestOutput:
        return llm.generate([lists[number]], PARAMS, on_event=lambda event: heard[number].add(event.request_id))[0]

    with ThreadPoolExecutor(len(lists)) as threads:
        outputs = list(threads.map(ask, range(len(lists))))
    assert [output.text for output in outputs] == expected
    assert heard == [{output.request_id} for output in outputs]  # nobody hears another's events


def test_a_callback_may_ask_too(llm: LLM, lists: list[Any]) -> None:
    inner: list[RequestOutput] = []

    def ask(event: BranchEvent) -> None:
        if isinstance(event, ForkEvent) and not inner:
            inner.extend(llm.generate([lists[1]], PARAMS))

    outer = llm.generate([lists[0]], PARAMS, on_event=ask)
    assert [outer[0].text, inner[0].text] == [output.text for output in llm.generate(lists[:2], PARAMS)]


def test_a_stream_that_is_dropped_in_a_step_ends_after_it(
    llm: LLM, lists: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector runs where it likes."""
    streams = [llm.stream(lists[0], ENDLESS)]
    next(streams[0])
    step, seen = llm._text.step, []

    def dropping() -> list[Any]:
        if streams:
            streams.clear()
            seen.append(llm.stats()["running_requests"])
        return step()

    monkeypatch.setattr(llm._text, "step", dropping)
    (output,) = llm.generate([lists[1]], PARAMS)
    assert seen == [1], "nothing is cancelled while a step runs"
    assert output.usage.completion_tokens > 1
    assert llm.stats()["running_requests"] == 0


def test_a_stream_that_was_never_begun_runs_nothing(llm: LLM, lists: list[Any]) -> None:
    stream = llm.stream(lists[0], ENDLESS)
    assert llm.stats()["waiting_requests"] == 1
    del stream
    gc.collect()
    assert llm.stats()["waiting_requests"] == 0


def test_a_closed_engine_says_so(tiny_engine: Path, lists: list[Any]) -> None:
    llm = LLM(tiny_engine, num_blocks=600)
    stream = llm.stream(lists[0], PARAMS)
    next(stream)
    llm.close()
    llm.close()
    calls: list[Callable[[], object]] = [
        lambda: llm.generate(lists[0], PARAMS),
        lambda: llm.stream(lists[0], PARAMS),
        lambda: next(stream),
        llm.stats,
    ]
    for call in calls:
        with pytest.raises(EngineStoppedError, match="has been closed; create a new one"):
            call()


def test_parameters_of_another_kind(llm: LLM) -> None:
    for params, message in (({"max_tokens": 5}, "not dict"), ([{"max_tokens": 5}], "not dict"), (5, "not int")):
        with pytest.raises(RequestError, match=rf"params must be SamplingParams.*{message}"):
            llm.generate("Hello.", params)  # type: ignore[arg-type]


def test_a_failing_step_is_an_error_result(llm: LLM, lists: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: object) -> None:
        raise ExecutorError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(llm.executor, "execute", fail)
        outputs = llm.generate(lists[:2], PARAMS)
    assert all(o.finish_reason == "error" and "out of luck" in (o.error or "") for o in outputs)
    assert llm.generate([lists[0]], PARAMS)[0].finish_reason == "stop"


def test_unknown_engines() -> None:
    with pytest.raises(EngineError, match="neither an engine directory nor a checkpoint"):
        LLM("no-such-thing")


def test_unknown_executor(tiny_engine: Path) -> None:
    with pytest.raises(ExecutorError, match="there is no executor 'abacus'"):
        LLM(tiny_engine, executor="abacus")


def test_engine_from_a_checkpoint_is_built_once(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "a cache"))
    with LLM(tiny_directory, num_blocks=64) as first:
        stamp = (first.engine_directory / "manifest.json").stat().st_mtime_ns
    with LLM("tiny", num_blocks=64) as second:
        assert second.engine_directory == first.engine_directory
    assert (second.engine_directory / "manifest.json").stat().st_mtime_ns == stamp
    weights = second.engine_directory / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    with LLM("tiny", num_blocks=64) as third:
        assert third.generate("Hello?", SamplingParams(max_tokens=2))[0].usage.completion_tokens >= 1


class TestAsync:
    """The asynchronous API."""

    @staticmethod
    def run(tiny_engine: Path, scenario: Any) -> None:
        async def whole() -> None:
            async with AsyncLLM(tiny_engine, num_blocks=600) as llm:
                await asyncio.wait_for(scenario(llm), 120)
                for _ in range(3000):
                    stats = await llm.stats()
                    if stats["live_branches"] == 0 and stats["waiting_requests"] == 0:
                        break
                    await asyncio.sleep(0.02)
                assert stats["kv_blocks_used"] == 0 and stats["live_branches"] == 0

        asyncio.run(whole())

    def test_streams_equal_batch_results(self, tiny_engine: Path, llm: LLM, lists: list[Any]) -> None:
        wanted = [o.text for o in llm.generate(lists, PARAMS)]

        async def scenario(model: AsyncLLM) -> None:
            async def one(messages: Any) -> str:
                order, result = ReadingOrderStream(), None
                text = ""
                async for item in model.stream(messages, PARAMS):
                    if isinstance(item, RequestOutput):
                        result = item
                    else:
                        text += order.feed(item)
                assert result is not None and result.text == text
                return text

            assert await asyncio.gather(*map(one, lists)) == wanted

        self.run(tiny_engine, scenario)

    def test_leaving_and_cancelling(self, tiny_engine: Path, lists: list[Any]) -> None:
        async def scenario(model: AsyncLLM) -> None:
            async def leave() -> None:
                async for _ in model.stream(lists[0], PARAMS):
                    return

            async def wait_for_cancellation() -> RequestOutput:
                return await model.generate(lists[1], PARAMS, request_id="mine")

            waiting = asyncio.create_task(wait_for_cancellation())
            await leave()
            killed = asyncio.create_task(model.generate(lists[2], ENDLESS))
            await asyncio.sleep(0.05)
            killed.cancel()
            if await model.cancel("mine"):
                assert (await waiting).finish_reason == "cancelled"
            assert not await model.cancel("nobody")
            with pytest.raises(asyncio.CancelledError):
                await killed

        self.run(tiny_engine, scenario)

    def test_a_task_cancelled_at_any_moment_leaves_no_request(self, tiny_engine: Path, lists: list[Any]) -> None:
        """Also while the request is on its way to the engine, where nobody would ever read its answer."""

        async def run() -> None:
            async with AsyncLLM(tiny_engine, num_blocks=600) as llm:
                for pause in (0.0, 0.0, 0.001, 0.01):
                    tasks = [asyncio.create_task(llm.generate(prompt, ENDLESS)) for prompt in lists]
                    await asyncio.sleep(pause)
                    for task in tasks:
                        task.cancel()
                    done = await asyncio.gather(*tasks, return_exceptions=True)
                    assert all(isinstance(result, asyncio.CancelledError) for result in done)
                    stats = await llm.stats()
                    assert stats["running_requests"] == stats["waiting_requests"] == stats["kv_blocks_used"] == 0

        asyncio.run(run())

    def test_deadlines(self, tiny_engine: Path, lists: list[Any]) -> None:
        async def scenario(model: AsyncLLM) -> None:
            late, good = await asyncio.gather(
                model.generate(lists[0], PARAMS, timeout=1e-9), model.generate(lists[1], PARAMS, timeout=3600)
            )
            assert (late.finish_reason, late.text) == ("deadline", "")
            assert good.finish_reason == "stop"

        self.run(tiny_engine, scenario)

    def test_errors_reach_their_caller_only(self, tiny_engine: Path, lists: list[Any]) -> None:
        async def scenario(model: AsyncLLM) -> None:
            good = asyncio.create_task(model.generate(lists[0], PARAMS))
            with pytest.raises(RequestError, match="the prompt is empty"):
                await model.generate("", PARAMS)
            with pytest.raises(CapacityError, match="context holds"):
                await model.generate([5] * 5000, PARAMS)
            assert (await good).finish_reason == "stop"

        self.run(tiny_engine, scenario)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"priority": "high"}, "priority must be a whole number from -2147483648 to 2147483648, not 'high'"),
            ({"priority": 2**70}, "priority must be a whole number"),
            ({"priority": None}, "priority must be a whole number"),
            ({"priority": True}, "priority must be a whole number"),
            ({"request_id": 5}, "request_id must be a string, not int"),
            ({"request_id": ["a"]}, "request_id must be a string, not list"),
        ],
    )
    def test_arguments_that_are_none_harm_nobody(
        self, tiny_engine: Path, lists: list[Any], options: dict[str, Any], message: str
    ) -> None:
        async def scenario(model: AsyncLLM) -> None:
            good = asyncio.create_task(model.generate(lists[0], PARAMS))
            with pytest.raises(RequestError, match=message):
                await model.generate(lists[1], PARAMS, timeout=60, **options)
            assert (await good).finish_reason == "stop"

        self.run(tiny_engine, scenario)

    def test_a_callers_id_may_look_like_ours(self, tiny_engine: Path, lists: list[Any]) -> None:
        async def scenario(model: AsyncLLM) -> None:
            stream = model.stream(lists[0], ENDLESS, request_id="request-0")
            await anext(aiter(stream))
            assert (await model.generate(lists[1], PARAMS)).request_id == "request-1"
            await stream.aclose()  # type: ignore[attr-defined]

        self.run(tiny_engine, scenario)

    def test_ids_in_use_are_refused(self, tiny_engine: Path, lists: list[Any]) -> None:
        async def scenario(model: AsyncLLM) -> None:
            stream = model.stream(lists[0], ENDLESS, request_id="same")
            await anext(aiter(stream))
            with pytest.raises(RequestError, match="'same' is still running"):
                await model.generate(lists[1], PARAMS, request_id="same")
            await stream.aclose()  # type: ignore[attr-defined]

        self.run(tiny_engine, scenario)

    def test_closing_ends_streams(self, tiny_engine: Path, lists: list[Any]) -> None:
        async def scenario() -> None:
            model = AsyncLLM(tiny_engine, num_blocks=600)
            running = [asyncio.create_task(model.generate(m, ENDLESS)) for m in lists]
            await asyncio.sleep(0.05)
            await model.close()
            results = await asyncio.gather(*running, return_exceptions=True)
            assert all(isinstance(r, EngineStoppedError | RequestOutput) for r in results)
            assert any(isinstance(r, EngineStoppedError) for r in results)
            with pytest.raises(EngineStoppedError, match="closed"):
                await model.generate(lists[0], PARAMS)

        asyncio.run(scenario())


def test_a_sample_is_uniform() -> None:
    """Whatever was observed when, it is kept as likely; few observations are all kept."""
    random.seed(7)
    sample = Sample(size=20)
    kept = np.zeros(300)
    for _ in range(400):
        for value in range(300):
            sample.add(value)
        taken = sample.take()
        assert len(taken) == len(set(taken)) == 20
        kept[np.array(taken, int)] += 1
    expected = 400 * 20 / 300
    assert abs(kept.reshape(10, 30).sum(axis=1) / (30 * expected) - 1).max() < 0.15
    for value in range(5):
        sample.add(value)
    assert sample.take() == [0, 1, 2, 3, 4] and not sample.take()
