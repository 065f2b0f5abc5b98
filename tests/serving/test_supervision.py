"""Faults of a service and its end: what dies is started again, what ends leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served_process import ServedProcess, children, name_of, wait_for

QUESTION: list[Any] = [{"role": "user", "content": "Tell me about the violin."}]
ENDLESS: dict[str, Any] = {"ignore_eos": True, "fork": False}


class Stream:
    """An answer that is being read in a thread."""

    def __init__(self, service: ServedProcess, choices: int = 1) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._client = service.client()
        self._chunks = self._client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, max_tokens=900, n=choices, extra_body=ENDLESS
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert wait_for(lambda: self.text), "no first token"

    def _read(self) -> None:
        try:
            for chunk in self._chunks:
                self.text += chunk.choices[0].delta.content or ""
                self.finish_reason = chunk.choices[0].finish_reason or self.finish_reason
        except Exception as error:
            self.error = error

    @property
    def running(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    def wait(self, seconds: float = 120.0) -> None:
        """Wait for its end."""
        self._thread.join(seconds)
        assert not self.running, "the stream hangs"
        self._client.close()


@pytest.fixture
def start(tiny_engine: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts services with options; all of them are ended."""
    running: list[ServedProcess] = []

    def begin(*options: str) -> ServedProcess:
        service = ServedProcess(tiny_engine, tmp_path / str(len(running)), *options)
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
        stream = Stream(service)
        server = service.server_pid()
        os.kill(service.engine_pid(), signal.SIGKILL)
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
        stream = Stream(service)
        server = service.server_pid()
        (stub,) = [pid for pid in children(server) if name_of(pid).startswith("triton_python")]
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
    def test_answers_in_flight_are_completed(self, start: Any) -> None:
        service = start("--drain-seconds", "120")
        # Many answers, so that the small engine has not ended them before it is asked to end itself.
        streams = [Stream(service, choices=6) for _ in range(2)]
        service.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: refusal(service) == "shutting_down")
        for stream in streams:
            stream.wait()
            assert stream.error is None and stream.finish_reason == "length"
        assert service.process.wait(30) == 0

    def test_answers_that_take_too_long_end_with_an_error(self, start: Any) -> None:
        service = start("--drain-seconds", "0.2")
        stream = Stream(service)
        service.process.send_signal(signal.SIGINT)
        stream.wait()
        assert isinstance(stream.error, openai.APIError), "an error that the client sees"
        assert service.process.wait(30) == 0
        assert "1 answers were not complete" in service.said()


def refusal(service: ServedProcess) -> str | None:
    """Code of the error that a new request gets."""
    with service.client() as client:
        try:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        except openai.APIStatusError as error:
            return error.code
        except openai.APIConnectionError:
            return None
    return None
