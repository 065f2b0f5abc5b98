"""Faults of a service and its end: what dies is started again, what ends leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from faulty_executor import SLOW
from served_process import WAIT_SECONDS, ServedProcess, children, name_of, wait_for

QUESTION: list[Any] = [{"role": "user", "content": "Tell me about the violin."}]
ENDLESS: dict[str, Any] = {"ignore_eos": True, "fork": False}


class Stream:
    """An answer that is being read in a thread; made when its first token is there."""

    def __init__(self, service: ServedProcess, max_tokens: int = 900) -> None:
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.pieces = 0
        """Chunks with text."""
        self._begun = threading.Event()
        self._client = service.client()
        self._chunks = self._client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, max_tokens=max_tokens, extra_body=ENDLESS
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._begun.wait(WAIT_SECONDS), "no first token"

    def _read(self) -> None:
        try:
            for chunk in self._chunks:
                if chunk.choices[0].delta.content:
                    self.pieces += 1
                    self._begun.set()
                self.finish_reason = chunk.choices[0].finish_reason or self.finish_reason
        except Exception as error:
            self.error = error
            self._begun.set()

    @property
    def running(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end."""
        self._thread.join(WAIT_SECONDS)
        assert not self.running, "the stream hangs"
        self._client.close()


@pytest.fixture
def start(tiny_engine: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts services with options and a slow engine; all of them are ended."""
    running: list[ServedProcess] = []

    def begin(*options: str) -> ServedProcess:
        service = ServedProcess(tiny_engine, tmp_path / str(len(running)), "--executor", SLOW, *options)
        running.append(service)
        return service.__enter__()

    yield begin
    for service in running:
        service.__exit__(None, None, None)
        assert wait_for(lambda: not service.left_behind()), service.left_behind()  # noqa: B023


def answers(service: ServedProcess) -> bool:
    """Whether it answers a request for a token."""
    with service.client() as client:
        try:
            return bool(client.completions.create(model="tiny", prompt="a", max_tokens=1).choices)
        except (openai.APIStatusError, openai.APIConnectionError):
            return False


class TestFaults:
    def test_what_dies_is_started_again(self, start: Any) -> None:
        service = start()

        # The engine: its requests get an error at once, the server stays.
        server, engine = service.server_pid(), service.engine_pid()
        stream = Stream(service)
        os.kill(engine, signal.SIGKILL)
        stream.wait()
        assert isinstance(stream.error, openai.APIError) and stream.error.code == "engine_failed"
        assert stream.finish_reason is None
        assert wait_for(lambda: answers(service))
        assert service.server_pid() == server

        # The server: clients get an error in the stream, and others a 503 until it is back.
        stream = Stream(service)
        os.kill(server, signal.SIGKILL)
        stream.wait()
        assert isinstance(stream.error, openai.APIError) and stream.error.code == "engine_failed"
        assert wait_for(lambda: answers(service))
        assert service.server_pid() != server
        assert service.metric("apar:gateway_server_restarts") == 1

        # A model's process, without which the server would let requests hang for ever.
        server = service.server_pid()
        (stub,) = [pid for pid in children(server) if name_of(pid).startswith("triton_python")]
        stream = Stream(service)
        os.kill(stub, signal.SIGKILL)
        stream.wait()
        assert stream.error is not None
        assert wait_for(lambda: answers(service))
        assert service.server_pid() != server

        # A server that is alive and says nothing is found out by the probe; too slow for a test (its first sign is
        # that requests fail at their deadline), so only its stop is tried here: SIGKILL ends a stopped process too.
        os.kill(service.server_pid(), signal.SIGSTOP)
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: service.process.poll() is not None)
        assert wait_for(lambda: not service.left_behind()), service.left_behind()

    def test_nothing_is_left_of_a_killed_service(self, start: Any) -> None:
        service = start()
        stream = Stream(service)
        service.process.kill()
        service.process.wait()
        stream.wait()
        assert stream.error is not None
        assert wait_for(lambda: not service.left_behind()), service.left_behind()


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_answers_in_flight_are_completed(self, start: Any, number: signal.Signals) -> None:
        service = start("--drain-seconds", "120")
        streams = [Stream(service, max_tokens=150) for _ in range(2)]
        service.process.send_signal(number)
        assert wait_for(lambda: refusal(service) == "shutting_down")
        for stream in streams:
            stream.wait()
            assert stream.error is None and stream.finish_reason == "length"
            assert stream.pieces > 10, "the text comes as it is said"
        assert service.process.wait(WAIT_SECONDS) == 0

    def test_a_terminal_that_is_closed_ends_nothing_under_nohup(self, start: Any) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as nohup has it
        try:
            service = start()
        finally:
            signal.signal(signal.SIGHUP, before)
        service.process.send_signal(signal.SIGHUP)
        stream = Stream(service, max_tokens=20)
        stream.wait()
        assert stream.error is None and stream.finish_reason == "length"
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(WAIT_SECONDS) == 0

    def test_answers_that_take_too_long_end_with_an_error(self, start: Any) -> None:
        service = start("--drain-seconds", "0.2")
        stream = Stream(service)
        assert wait_for(lambda: service.metric("apar:num_requests_running") == 1), "its end is still to be decoded"
        service.process.send_signal(signal.SIGINT)
        stream.wait()
        assert isinstance(stream.error, openai.APIError), "an error that the client sees"
        assert service.process.wait(WAIT_SECONDS) == 0
        assert "1 answers were not complete" in service.said()


def refusal(service: ServedProcess) -> str | None:
    """Code of the error that a new request gets."""
    connection = http.client.HTTPConnection(*service.address, timeout=WAIT_SECONDS)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}))
        code: str | None = json.loads(connection.getresponse().read()).get("error", {}).get("code")
        return code
    return None
