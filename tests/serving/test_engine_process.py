"""The engine process by itself: its socket, its messages, and when it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_executor import NAME, Control
from served_process import WAIT_SECONDS

from apar.export.errors import EngineStoppedError
from apar.runtime.branch import Branch
from apar.runtime.llm import LLM, load_text_engine
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.engine.connection import SEND_BUFFER, Connection
from apar.runtime.serving.engine.flight import Flight
from apar.runtime.serving.engine.process import EXIT_HANGS, EngineProcess, is_alive
from apar.runtime.serving.engine.request import parse_request
from apar.runtime.serving.engine.wire import Decoder, Message, encode
from apar.runtime.tokenizer import Tokenizer

QUESTION = "Name three rules for growing pumpkins."


class Model:
    """A model's side of the socket."""

    def __init__(self, folder: Path, role: str = "owner", settings: dict[str, str] | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_SECONDS)
        self.socket.connect(str(folder / "engine.sock"))
        self._decoder = Decoder()
        self._read: list[Message] = []
        self.numbers: list[Message] = []
        """What the engine said about itself."""
        self.send({"op": "hello", "role": role, "settings": settings})
        self.hello = self.take()

    def send(self, message: Message) -> None:
        self.socket.sendall(encode(message))

    def take(self) -> Message:
        """The next message that is not about numbers. Raises ConnectionError when the engine hangs up."""
        while True:
            while not self._read:
                self._receive()
            message = self._read.pop(0)
            if message.get("op") != "metrics":
                return message
            self.numbers.append(message)

    def await_numbers(self) -> Message:
        """The next numbers, when nothing else is to come."""
        self._receive()
        assert all(message.get("op") == "metrics" for message in self._read)
        self.numbers += self._read
        self._read = []
        return self.numbers[-1]

    def _receive(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError
        self._read += self._decoder.feed(data)

    def ask(self, number: int, **more: Any) -> None:
        self.send({"op": "generate", "id": number, "text": QUESTION, "params": {"max_tokens": 200}, **more})

    def close(self) -> None:
        self.socket.close()


class Process:
    """An engine process in a folder, for a server that is this test."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = settings
        stat = Path(f"/proc/{os.getpid()}/stat").read_text(encoding="utf-8")
        server = {"pid": os.getpid(), "started": stat.rpartition(")")[2].split()[19]}
        (folder / "settings.json").write_text(json.dumps({"settings": settings, "server": server}))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent.parent)])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apar.runtime.serving.engine", str(folder)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdout is not None
        self.status = json.loads(self.process.stdout.readline() or "{}")

    def connect(self, role: str = "owner") -> Model:
        return Model(self.folder, role, self.settings if role == "owner" else None)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for the address of a socket."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="apar") as name:
        yield Path(name)


@pytest.fixture
def process(folder: Path, tiny_engine: Path) -> Iterator[Process]:
    running = Process(folder, engine=str(tiny_engine), num_blocks="200")
    yield running
    running.end()


def test_answers_and_ends_with_its_last_owner(process: Process, reference: LLM) -> None:
    assert process.status == {"ready": True}
    owner, view = process.connect(), process.connect("view")
    assert owner.hello["op"] == view.hello["op"] == "ready" and owner.hello["pid"] == process.process.pid
    (wanted,) = reference.generate([QUESTION], SamplingParams(max_tokens=200))
    for model in (owner, view):
        model.ask(7)
        message = model.take()
        assert (message["id"], message["text"]) == (7, wanted.text)
        assert message["final"]["finish_reason"] == "stop"
    view.close()
    owner.send({"op": "bye"})
    with pytest.raises(ConnectionError):
        owner.take()
    assert process.process.wait(WAIT_SECONDS) == 0
    assert sorted(path.name for path in process.folder.iterdir()) == ["settings.json"]


def test_ends_when_its_owner_is_gone_though_others_are_there(process: Process) -> None:
    owner, view = process.connect(), process.connect("view")
    view.ask(1, params={"max_tokens": 20})
    owner.close()
    assert "final" in view.take()  # time enough for what is in flight
    assert process.process.wait(WAIT_SECONDS) == 0


def test_a_second_owner_with_other_settings_is_refused(process: Process) -> None:
    first = process.connect()
    other = Model(process.folder, "owner", {**process.settings, "num_blocks": "100"})
    assert other.hello["op"] == "refused"
    assert "runs with num_blocks '200', and the configuration now says '100'" in other.hello["error"]
    second = process.connect()
    first.close()
    second.ask(1)
    assert "final" in second.take()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(process: Process, number: int) -> None:
    """Ctrl-C is the server's business; SIGTERM ends the process, and what is in flight is told."""
    owner = process.connect()
    owner.ask(1, stream=True, params={"max_tokens": 2000, "ignore_eos": True, "fork": False})
    owner.take()
    os.kill(process.process.pid, number)
    message: Message = {}
    while "final" not in message and "error" not in message:
        message = owner.take()
    if number == signal.SIGINT:
        assert message["final"]["finish_reason"] == "length"
        return
    assert message["error"] == ["engine_failed", "the engine ended while it worked on this request; send it again"]
    assert process.process.wait(WAIT_SECONDS) == 0


@pytest.mark.parametrize("data", [b"\xff" * 64, b"\0\0\0\x02{]", b"GET / HTTP/1.1\r\n\r\n"])
def test_nonsense_ends_only_its_own_connection(process: Process, data: bytes) -> None:
    owner, other = process.connect(), process.connect("view")
    other.socket.sendall(data)
    with pytest.raises(ConnectionError):
        other.take()
    owner.send({"op": "no such thing", "id": 1})
    owner.send({"op": "generate", "id": 2})
    assert owner.take() == {
        "id": 2,
        "error": ["invalid_request", "there is no prompt; give text_input, messages or input_ids"],
    }
    owner.send({"op": "generate", "id": 3, "text": QUESTION, "params": 5, "priority": "high"})
    assert owner.take()["error"][0] == "internal"
    owner.ask(4)
    assert "final" in owner.take()


def test_a_connection_that_breaks_ends_its_requests(process: Process) -> None:
    owner, view = process.connect(), process.connect("view")
    for number in range(20):
        view.ask(number, params={"max_tokens": 400, "ignore_eos": True})
    view.close()
    end = time.monotonic() + WAIT_SECONDS
    name = 'request_errors_total{code="cancelled"}'
    while sum(numbers["counters"].get(name, 0) for numbers in owner.numbers) < 20:
        assert time.monotonic() < end
        gauges = owner.await_numbers()["gauges"]
    assert gauges["num_requests_running"] == gauges["num_requests_waiting"] == gauges["kv_blocks_used"] == 0
    owner.ask(1)
    assert "final" in owner.take()


def test_a_step_that_hangs_ends_the_process(folder: Path, tiny_engine: Path, tmp_path: Path) -> None:
    control = Control(tmp_path)
    options = json.dumps({"control": str(control.folder)})
    running = Process(
        folder, engine=str(tiny_engine), executor=NAME, executor_options=options, step_timeout_s="1", num_blocks="64"
    )
    with contextlib.closing(running.connect()) as owner:
        control.order(hold_at=control.steps + 2)
        owner.ask(1)
        with pytest.raises(ConnectionError):
            owner.take()
        assert running.process.wait(WAIT_SECONDS) == EXIT_HANGS
    running.end()


def test_drafts_change_nothing_but_the_numbers(folder: Path, tiny_engine: Path, reference: LLM) -> None:
    (wanted,) = reference.generate([QUESTION], SamplingParams(max_tokens=200))
    # Whether drafts save time differs from machine to machine: it is not asked here.
    options = json.dumps({"measured": False})
    running = Process(folder, engine=str(tiny_engine), draft="ngram", draft_options=options, num_blocks="200")
    with contextlib.closing(running.connect()) as owner:
        owner.ask(1, stream=True, params={"max_tokens": 200, "logprobs": 0})
        message: Message = {}
        text, logprobs = "", 0
        while "final" not in message:
            message = owner.take()
            text += message.get("text", "")
            logprobs += len(message.get("logprobs", ()))
        assert text == wanted.text
        assert message["final"]["steps"] < wanted.timing.steps
        assert logprobs == sum(len(branch.token_ids) for branch in wanted.branches)
        owner.await_numbers()
        owner.await_numbers()  # of after the answer, at the latest
        totals = {
            name: sum(numbers["counters"].get(name, 0) for numbers in owner.numbers)
            for name in ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
        }
        assert totals["spec_decode_num_draft_tokens_total"] > totals["spec_decode_num_accepted_tokens_total"] > 0
    running.end()


def test_a_host_tier_shows_in_the_numbers(folder: Path, tiny_engine: Path) -> None:
    sizes = {"max_rows": "4", "num_blocks": "16", "host_blocks": "99"}
    running = Process(folder, engine=str(tiny_engine), executor="torch", device="cpu", **sizes)
    with contextlib.closing(running.connect()) as owner:
        for number in range(6):  # more than the pool holds, once they have ended
            owner.ask(number, text=f"Question {number}: {QUESTION}", params={"max_tokens": 60})
        ends = 0
        while ends < 6:
            ends += "final" in owner.take()
        owner.await_numbers()
        gauges = owner.await_numbers()["gauges"]
        swapped = sum(numbers["counters"].get("blocks_swapped_out_total", 0) for numbers in owner.numbers)
        assert gauges["host_blocks_total"] == 99 and 0 < gauges["host_blocks_used"] <= swapped
    running.end()


def test_what_cannot_be_loaded_is_said(folder: Path) -> None:
    for settings, message in (
        ({"engine": "/no/such/engine"}, "/no/such/engine is neither an engine directory"),
        ({"engine": "tiny", "executor": "json:loads"}, "the engine cannot be loaded"),
        ({"engine": "tiny", "executor": "json:nothing"}, "there is no executor 'json:nothing': json has no nothing"),
        ({"engine": "tiny", "executor": "no_such_module:It"}, "needs the package no_such_module"),
    ):
        running = Process(folder, **settings)
        assert message in running.status["error"]
        assert running.process.wait(WAIT_SECONDS) == 1
        running.end()


# ---------------------------------------------------------------- without a process


def test_a_slow_reader_gets_fewer_and_longer_messages(tiny_engine: Path) -> None:
    """Nothing is lost: what was said while the connection was busy is in the next message."""
    tokenizer = Tokenizer.load(tiny_engine)
    text = load_text_engine(tiny_engine, num_blocks=16)
    request = parse_request({"text": "Hello?", "stream": True, "events": True, "params": {}}, text)
    here, there = socket.socketpair()
    connection = Connection(here, lambda *_: None, lambda *_: None)
    connection.start()
    flight = Flight(5, connection, request, tokenizer)
    flight.answer = answer = text.submit(request.token_ids, request.params, listens=flight.listens)
    root = Branch(answer.request, 0, None, depth=1, ordinal=0, start=0, key=0)
    child = dataclasses.replace(root, branch_id=1, parent=root, depth=2)
    root.finish_reason = child.finish_reason = "stop"
    ids = [id for id, data in enumerate(tokenizer.bytes_table) if data.isalpha()]
    tokens = [ids[number % len(ids)] for number in range(4000)]
    for number, token in enumerate(tokens):
        answer.grow(root, token, number)
        connection.send_from([flight])
    answer.fork(child, 4000)
    answer.end(root, 4000)
    answer.grow(child, ids[0], 4001)
    answer.end(child, 4001)
    connection.send_from([flight])
    connection.close()
    received = b""
    while data := there.recv(1 << 20):
        received += data
    messages = list(Decoder().feed(received))
    said = tokenizer.decode(tokens)
    assert len(messages) < len(tokens) / 4 and len(received) > SEND_BUFFER
    assert "".join(message.get("text", "") for message in messages).startswith(said)
    rows = [
        row
        for message in messages
        for row in zip(*(message["events"][name] for name in ("event", "branch_id", "text", "ids")), strict=True)
    ]
    assert "".join(text for kind, branch, text, _ in rows if (kind, branch) == ("delta", 0)) == said
    assert [i for _, branch, _, ids in rows if branch == 0 for i in ids] == tokens
    assert [row[:3] for row in rows if row[0] != "delta"] == [
        ("fork", 1, ""),
        ("finish", 0, "stop"),
        ("finish", 1, "stop"),
    ]
    there.close()
    text.close()


def test_numbers_are_reported_again_and_again(tmp_path: Path) -> None:
    """Also where the loop has taken and sent them before the thread that asked for them goes on."""
    process = EngineProcess(tmp_path, io.StringIO())
    sent: list[Message] = []

    class Owner:
        send = staticmethod(sent.append)

    class PromptService:
        """Does at once what is posted."""

        loop = property(lambda self: self)
        owners = staticmethod(lambda: [Owner()])
        numbers = staticmethod(dict)

        def post(self, command: Any) -> bool:
            command()
            return True

    process._service = PromptService()  # type: ignore[assignment]
    for _ in range(3):
        process._report()
    assert sent == [{"op": "metrics"}] * 3


def test_a_server_that_cannot_be_seen_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Path(f"/proc/{os.getpid()}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), "1") and not is_alive(2**22 + 1, started)

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Path, "read_text", fail)
    assert is_alive(os.getpid(), started)


def test_the_last_message_comes_once(tiny_engine: Path) -> None:
    """Also where the writer meets the end of an answer before it is told of it."""
    text = load_text_engine(tiny_engine, num_blocks=16)
    here, there = socket.socketpair()
    connection = Connection(here, lambda *_: None, lambda *_: None)
    answer = text.submit(text.encode("Hello?"), SamplingParams(max_tokens=2))
    while not text.idle:
        text.step()
    for ends in ("output", "error"):
        flight = Flight(
            1, connection, parse_request({"text": "Hello?", "stream": True, "params": {}}, text), text.tokenizer
        )
        flight.answer = answer
        if ends == "output":
            flight.end()
        else:
            flight.fail(("internal", "x"))
        assert flight.message() is not None
        assert flight.message() is None
    here.close()
    there.close()
    text.close()


def test_a_loop_that_dies_tells_everyone(tiny_engine: Path) -> None:
    from apar.runtime.engine_loop import EngineLoop

    reasons: list[str] = []
    ended = threading.Event()
    loop = EngineLoop(
        load_text_engine(tiny_engine, num_blocks=16),
        lambda answer: None,
        lambda why: (reasons.append(why), ended.set())[0],
    )
    loop.start()
    assert loop.call(lambda: 5).result(WAIT_SECONDS) == 5
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 / 0).result(WAIT_SECONDS)
    assert loop.post(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert ended.wait(WAIT_SECONDS)
    assert reasons == ["the engine stopped: broken"]
    with pytest.raises(EngineStoppedError, match="the engine stopped: broken"):
        loop.call(lambda: 5).result(WAIT_SECONDS)
    assert not loop.post(lambda: None) and loop.close(WAIT_SECONDS)


def test_a_loop_that_dies_answers_what_was_to_come(tiny_engine: Path) -> None:
    from apar.runtime.engine_loop import EngineLoop

    text = load_text_engine(tiny_engine, num_blocks=16)
    told = threading.Event()
    loop = EngineLoop(text, lambda answer: None, lambda why: told.set())
    held, go = threading.Event(), threading.Event()
    loop.start()
    assert loop.post(lambda: (held.set(), go.wait(WAIT_SECONDS), None)[-1])
    assert held.wait(WAIT_SECONDS)
    # All of these are taken up together, and the first ends the loop.
    assert loop.post(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    waiting = loop.call(lambda: 5)
    assert loop.post(lambda: (_ for _ in ()).throw(RuntimeError("broken once more")))
    also_waiting = loop.call(lambda: 1 / 0)
    go.set()
    assert waiting.result(WAIT_SECONDS) == 5
    with pytest.raises(ZeroDivisionError):
        also_waiting.result(WAIT_SECONDS)
    assert told.wait(WAIT_SECONDS) and loop.close(WAIT_SECONDS)
    assert loop.step_since is None
