"""Requests that are stopped, left or late, in every state: each ends within the step that runs, with exactly one last
response, and leaves no block behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_executor import NAME, Control
from triton_grpc import Stream
from triton_service import TritonService, in_threads

from apar.runtime.llm import LLM
from apar.runtime.outputs import BranchEvent, DeltaEvent, ForkEvent
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.triton_server import TritonServer

QUESTION = "Name three rules for growing pumpkins."
MAX_TOKENS = 200
MAX_ROWS = 8
ADMITTED = 2 * MAX_ROWS
"""Live branches up to which requests are admitted."""


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Control:
    return Control(tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def held(
    installed_server: TritonServer, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory, control: Control
) -> Iterator[TritonService]:
    """A server with few rows, short steps and no prefix cache, whose engine stands still where a test says."""
    parameters = {
        "executor": NAME,
        "executor_options": json.dumps({"control": str(control.folder)}),
        "max_rows": str(MAX_ROWS),
        "max_step_tokens": str(2 * MAX_ROWS),
        "max_requests": "24",
        "prefix_caching": "false",
    }
    folder = tmp_path_factory.mktemp("held")
    with TritonService(installed_server, folder, tiny_engine, parameters=parameters) as service:
        yield service


@pytest.fixture(autouse=True)
def clean(held: TritonService, control: Control) -> Iterator[None]:
    """After every test no order is left, and every block is free."""
    yield
    control.release()
    held.await_idle()


class Client:
    """Asks on one gRPC stream and keeps what came, by request."""

    def __init__(self, service: TritonService) -> None:
        self.stream = Stream(service)
        self.texts: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.finals: dict[str, int] = {}
        self.errors: list[str] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.__exit__()

    def ask(self, request_id: str, **more: Any) -> None:
        inputs = {"text_input": [[QUESTION]], "max_tokens": np.array([[MAX_TOKENS]], np.int32), "stream": [[True]]}
        self.stream.send({**inputs, **more}, request_id=request_id)

    def stop(self, request_id: str) -> None:
        """Stop a request; returns when the engine has been told, which need not have acted yet."""
        self.stream.send({"stop": [[True]]}, "tensorrt_llm", request_id=request_id)
        self.probe("tensorrt_llm", input_ids=np.zeros((1, 0), np.int32))

    def probe(self, model: str, **inputs: Any) -> None:
        """Send what is refused as soon as the engine reads it: so it has read everything that was sent before."""
        self.stream.send(inputs, model, request_id="probe")
        self.until(probe=1)
        assert "the prompt is empty" in self.errors.pop()
        del self.finals["probe"]

    def until(self, **finals: int) -> None:
        """Read until so many last responses came; a request and the `stop` for it have the same id."""
        while any(self.finals.get(name, 0) < count for name, count in finals.items()):
            request, result, last, error = self.stream.take()
            if error:
                self.errors.append(error)
                continue
            text, reason = result.as_numpy("text_output"), result.as_numpy("finish_reason")
            if text is not None:
                self.texts[request] = self.texts.get(request, "") + text[0].decode()
            if reason is not None:
                self.reasons[request] = reason[0].decode()
                self.tokens[request] = int(result.as_numpy("completion_tokens")[0])
            self.finals[request] = self.finals.get(request, 0) + last


class Answer:
    """The undisturbed answer, step by step."""

    def __init__(self, llm: LLM) -> None:
        events: list[BranchEvent] = []
        (output,) = llm.generate([QUESTION], SamplingParams(max_tokens=MAX_TOKENS), on_event=events.append)
        first = output.branches[0].first_step
        self.text = output.text
        self.prompt_steps = -(-output.usage.prompt_tokens // (2 * MAX_ROWS))
        self.steps = output.timing.steps
        self.tokens = output.usage.completion_tokens
        deltas = [event for event in events if isinstance(event, DeltaEvent)]
        self.tokens_by_step = [
            sum(len(event.token_ids) for event in deltas if event.step < first + step) for step in range(self.steps + 1)
        ]
        """Tokens after so many steps that sampled, ends not counted."""
        self.fork_steps = [event.step - first + 1 for event in events if isinstance(event, ForkEvent)]


@pytest.fixture(scope="module")
def answer(reference: LLM) -> Answer:
    return Answer(reference)


def test_the_first_response_is_that_of_the_first_token(held: TritonService, control: Control, answer: Answer) -> None:
    """It is there while the engine stands still before the second one."""
    with Client(held) as client:
        control.order(hold_at=control.steps + answer.prompt_steps + 1)
        client.ask("first")
        control.await_hold()
        while not client.texts:
            request, result, last, error = client.stream.take()
            assert not last and not error
            client.texts[request] = result.as_numpy("text_output")[0].decode()
        assert client.texts["first"] == answer.text.split()[0] == "Here"
        control.release()
        client.until(first=1)
        assert client.texts["first"] == answer.text


def test_stopped_before_and_after_every_step(held: TritonService, control: Control, answer: Answer) -> None:
    """While its prompt is read, while it decodes, between a fork and the child's first step: no further step runs."""
    moments = range(1, answer.prompt_steps + answer.steps - 1)
    assert all(answer.prompt_steps + step - 1 in moments for step in answer.fork_steps) and len(answer.fork_steps) > 1
    with Client(held) as client:
        for moment in moments:
            name, last_step = f"stopped{moment}", control.steps + moment
            control.order(hold_at=last_step)
            client.ask(name)
            assert control.await_hold() == last_step
            client.stop(name)
            control.release()
            client.until(**{name: 2})
            assert (client.finals[name], client.errors) == (2, [])
            assert client.reasons[name] == "cancelled"
            sampled = max(0, moment - answer.prompt_steps + 1)
            assert answer.tokens_by_step[sampled] <= client.tokens[name] <= answer.tokens_by_step[sampled] + 4
            assert control.steps == last_step
    held.await_idle()
    assert control.steps == last_step


@pytest.mark.parametrize("model", ["apar", "tensorrt_llm_bls"])
def test_stopped_while_it_waits(held: TritonService, control: Control, answer: Answer, model: str) -> None:
    with Client(held) as client:
        control.order(hold_at=control.steps + 3)
        for number in range(ADMITTED):
            client.ask(f"r{number}", fork=[[False]])
        client.ask("late")
        client.probe("apar", text_input=[[""]])
        control.await_hold()
        client.stop("late")
        control.release()
        client.until(late=2)
        assert (client.reasons["late"], client.tokens["late"], client.texts["late"]) == ("cancelled", 0, "")
        client.until(**{f"r{number}": 1 for number in range(ADMITTED)})
        assert {client.reasons[f"r{number}"] for number in range(ADMITTED)} == {"stop"}
        assert not client.errors and set(client.finals.values()) == {1, 2}


def test_stop_of_nothing(held: TritonService) -> None:
    assert held.generate({"stop": True, "id": "nobody"})["text_output"] == ""
    assert held.generate({"stop": True, "id": "nobody"}, "tensorrt_llm")["sequence_length"] == 0


def test_deadlines_in_every_state(held: TritonService, control: Control, answer: Answer) -> None:
    """While the prompt is read, while it decodes, and right after a fork; the time passes while a step is held."""
    moments = sorted({1, answer.prompt_steps, *(answer.prompt_steps + step - 1 for step in answer.fork_steps[:2])})
    with Client(held) as client:
        for moment in moments:
            # A machine that is too slow to reach the moment within the deadline gets a longer one.
            for seconds in (1, 5, 25):
                name, last_step = f"late{moment}-{seconds}", control.steps + moment
                control.order(hold_at=last_step)
                client.ask(name, timeout_ms=np.array([[1000 * seconds]], np.int32))
                held_step = control.held_within(seconds)
                if held_step is not None:
                    break
                control.release()
                client.until(**{name: 1})
                client.errors.clear()
                client.reasons.clear()
            assert held_step == last_step
            time.sleep(seconds + 0.1)
            control.release()
            client.until(**{name: 1})
            assert client.reasons == {}
            assert client.errors == ["deadline_exceeded: the request was not complete within its timeout_ms"]
            client.errors.clear()
            assert control.steps == last_step


def test_a_deadline_while_it_waits(held: TritonService, control: Control) -> None:
    with Client(held) as client:
        control.order(hold_at=control.steps + 2)
        for number in range(ADMITTED):
            client.ask(f"r{number}", fork=[[False]])
        client.ask("late", timeout_ms=np.array([[200]], np.int32))
        client.probe("apar", text_input=[[""]])
        control.await_hold()
        time.sleep(0.3)
        control.release()
        client.until(late=1)
        assert [error.split(":")[0] for error in client.errors] == ["deadline_exceeded"]
        client.until(**{f"r{number}": 1 for number in range(ADMITTED)})
        assert {client.reasons[f"r{number}"] for number in range(ADMITTED)} == {"stop"}


def test_clients_that_go_away(held: TritonService, control: Control) -> None:
    """Over HTTP, before the first response and after some; nobody else is disturbed."""
    before = held.await_idle().get('apar:request_errors_total{code="cancelled"}', 0.0)
    control.order(pause=0.1)  # an answer takes over five seconds

    def leave(index: int) -> None:
        responses = held.stream({"text_input": QUESTION, "max_tokens": MAX_TOKENS})
        for _ in range(index + 1):
            next(responses)
        responses.close()  # type: ignore[attr-defined]

    in_threads(4, leave)
    held.await_metrics(**{'request_errors_total{code="cancelled"}': before + 4})


def test_more_than_it_holds(held: TritonService, control: Control) -> None:
    control.order(hold_at=control.steps + 1)
    with Client(held) as client:
        for number in range(30):
            client.ask(f"r{number}", max_tokens=np.array([[3]], np.int32))
        client.probe("apar", text_input=[[""]])
        control.await_hold()
        control.release()
        client.until(**{f"r{number}": 1 for number in range(30)})
        assert client.errors == ["overloaded: 24 requests are in flight already; send it later"] * 6
        assert list(client.reasons.values()) == ["length"] * 24


def test_a_step_that_fails_takes_only_its_own_requests(held: TritonService, control: Control, answer: Answer) -> None:
    with Client(held) as client:
        held_step, names = control.steps + 8, [f"r{number}" for number in range(12)]
        control.order(hold_at=held_step)
        for name in names:
            client.ask(name)
        control.await_hold()
        control.order(fail_at=held_step)
        client.until(**dict.fromkeys(names, 1))
        failed = [name for name in names if name not in client.reasons]
        assert 1 <= len(failed) <= MAX_ROWS
        assert client.errors == ["engine_failed: the step failed: the fault was ordered"] * len(failed)
        for name, reason in client.reasons.items():
            assert (reason, client.texts[name]) == ("stop", answer.text)
    pid = held.engine_pid()
    held.await_idle()
    assert held.generate({"text_input": QUESTION, "max_tokens": MAX_TOKENS})["text_output"] == answer.text
    assert held.engine_pid() == pid


def test_an_engine_whose_every_step_fails_is_started_again(
    held: TritonService, control: Control, answer: Answer
) -> None:
    pid = held.engine_pid()
    control.order(fail_at=control.steps + 1, times=10**6)
    errors = [held.generate({"text_input": QUESTION, "max_tokens": 5})["error"] for _ in range(5)]
    assert set(errors) == {"engine_failed: the step failed: the fault was ordered"}
    control.release()
    assert held.await_engine(other_than=pid) != pid
    assert held.generate({"text_input": QUESTION, "max_tokens": MAX_TOKENS})["text_output"] == answer.text
