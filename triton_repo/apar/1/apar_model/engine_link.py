"""The way from a model's stub process to the engine process: talk to it, and come back when it is gone.

One thread owns all response senders: it reads the engine's messages, sends responses and looks for cancelled requests,
so that nothing touches a sender after its last response. `execute` only writes requests to the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from apar_model.answer import Answer
from apar_model.engine_directory import EngineDirectory, LinkError, log
from apar_model.engine_starter import EngineStarter
from apar_model.settings import ModelSettings
from apar_model.wire import Decoder, Message, encode, join

MAX_REQUEST = 16 << 20
"""Bytes of one request on its way to the engine."""
CANCEL_PERIOD = 0.05
"""Seconds between two looks at one request, at most `CANCEL_RATE` looks a second in all: each asks the server."""
CANCEL_RATE = 500
FIRST_BACKOFF, LAST_BACKOFF = 0.2, 10.0
HEALTHY_AFTER = 60.0
"""Seconds of service after which the next failure counts as the first."""
HELLO_TIMEOUT = 30.0
OWNER_APPEARS = 10.0
"""Seconds that a model without an engine of its own waits for the model that has it to begin loading."""
GOODBYE = 10.0

UNAVAILABLE = "engine_unavailable"
FAILED = "engine_failed"
INVALID = "invalid_request"


class EngineLink:
    """Keeps one connection to the engine and passes requests and their answers.

    Args:
        model: name of the model.
        settings: of the model.
        on_numbers: called with the engine's numbers, about twice a second, where the model owns the engine.
        on_change: called with False when the engine is gone, with True when it is there again.

    Both are called in the link's thread.
    """

    def __init__(
        self,
        model: str,
        settings: ModelSettings,
        on_numbers: Callable[[Message], None],
        on_change: Callable[[bool], None],
    ) -> None:
        self.facts: Message = {}
        """What the engine said about itself when it was reached last."""
        self._model = model
        self._owner = settings.owner
        self._owner_name = settings.engine_of
        self._wanted = settings.engine
        self._timeout = settings.startup_timeout
        self._directory = EngineDirectory(settings.engine_of)
        self._starter = EngineStarter(settings.engine_python, settings.engine, self._directory, self._timeout)
        self._on_numbers = on_numbers
        self._on_change = on_change
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._requests: dict[int, Answer] = {}
        self._down = "the engine is starting; send the request again soon"
        self._closing = threading.Event()
        self._numbers = itertools.count(1)
        self._turns: list[int] = []
        self._next_look = 0.0
        self._decoder = Decoder()
        self._thread = threading.Thread(target=self._run, name="apar-link", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._socket is not None

    def open(self) -> None:
        """Return once the engine is ready. Raises LinkError."""
        if self._owner:
            self._directory.create()
            try:
                self._connect_or_start()
            except LinkError as error:
                self._directory.write_failure(str(error))
                raise
        else:
            self._await_owner()
        self._thread.start()

    def close(self) -> None:
        """Leave. The engine ends with its last owner, and this returns when it has."""
        self._closing.set()
        if self._socket is None:
            self._starter.kill()
            return
        self._write({"op": "bye"})
        self._thread.join(GOODBYE)
        self._starter.await_end(0.5)  # another instance of the model may keep the engine

    def submit(self, message: Message, answer: Answer) -> tuple[str, str] | None:
        """Send a request; what the engine says goes to `answer`, in the link's thread.

        Returns (code, sentence) if the request was not taken; `answer` hears nothing then.
        """
        number = next(self._numbers)
        data = encode({**message, "id": number})
        if len(data) > MAX_REQUEST:
            return INVALID, f"the request has {len(data)} bytes, at most {MAX_REQUEST} are allowed"
        with self._lock:
            if self._socket is None:
                return UNAVAILABLE, self._down
            self._requests[number] = answer
            self._send(data)
        return None

    # ---------------------------------------------------------------- the link's thread

    def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            since = time.monotonic()
            self._serve()
            self._disconnect()
            if self._closing.is_set():
                return
            log(f"{self._model}: the engine process has ended")
            self._tell(False)
            if time.monotonic() - since > HEALTHY_AFTER:
                backoff = FIRST_BACKOFF
            while not self._come_back(backoff):
                if self._closing.is_set():
                    return
                backoff = min(2 * backoff, LAST_BACKOFF)
            self._tell(True)

    def _tell(self, up: bool) -> None:
        with self._complaint("a change could not be shown"):
            self._on_change(up)

    def _come_back(self, backoff: float) -> bool:
        """One more try to reach the engine; only its owner starts it again."""
        self._closing.wait(backoff if self._owner else FIRST_BACKOFF)
        if self._closing.is_set():
            return False
        try:
            if self._owner:
                self._connect_or_start()
            else:
                self._connect()
        except (LinkError, OSError) as error:
            if self._owner:
                log(f"{self._model}: the engine could not be started again: {error}")
            return False
        return True

    def _serve(self) -> None:
        """Read and look for cancelled requests until the engine is gone."""
        sock = self._socket
        assert sock is not None
        while True:
            wait = CANCEL_PERIOD
            if self._requests:
                wait = min(max(0.0, self._next_look - time.monotonic()), CANCEL_PERIOD)
            if select.select([sock], [], [], wait)[0]:
                try:
                    data = sock.recv(1 << 18)
                except OSError:
                    return
                if not data:
                    return
                # A response takes the server longer than a step may last: joined, answers keep up with the engine.
                for message in join(self._decoder.feed(data)):
                    self._take(message)
            if self._requests and time.monotonic() >= self._next_look:
                self._look()

    def _take(self, message: Message) -> None:
        if message.get("op") == "metrics":
            with self._complaint("numbers could not be shown"):
                self._on_numbers(message)
            return
        number = message.get("id", 0)
        answer = self._requests.get(number)
        if answer is None:
            return
        error = message.get("error")
        if error or "final" in message or "stopped" in message:
            with self._lock:
                del self._requests[number]
        try:
            if error:
                answer.error(*error)
            else:
                answer.message(message)
        except Exception as problem:
            log(f"{self._model}: a response could not be sent: {problem}")
            self._give_up(number, answer)

    def _give_up(self, number: int, answer: Answer) -> None:
        """End a request whose response could not be put together or sent: it must not wait for ever."""
        with self._lock:
            self._requests.pop(number, None)
        self._write({"op": "cancel", "id": number})
        with self._complaint("it could not be ended either"):
            answer.error("internal", "a response could not be put together")

    def _look(self) -> None:
        """Ask whether one request has been cancelled; each gets its turn."""
        while self._turns and self._turns[-1] not in self._requests:
            self._turns.pop()
        if not self._turns:
            with self._lock:
                self._turns = list(self._requests)
        number = self._turns.pop()
        self._next_look = time.monotonic() + max(CANCEL_PERIOD / len(self._requests), 1 / CANCEL_RATE)
        answer = self._requests[number]
        with self._complaint("the server could not be asked about a request"):
            if not answer.asked_to_end and answer.is_cancelled():
                answer.asked_to_end = True
                self._write({"op": "cancel", "id": number})

    def _disconnect(self) -> None:
        """Answer everything that was in flight."""
        with self._lock:
            sock, self._socket = self._socket, None
            self._down = "the engine process has ended and is being started again; send the request again soon"
            requests, self._requests = self._requests, {}
        assert sock is not None
        sock.close()
        for answer in requests.values():
            with self._complaint("a response could not be sent"):
                answer.error(FAILED, "the engine process ended while it worked on this request; send it again")

    @contextlib.contextmanager
    def _complaint(self, text: str) -> Iterator[None]:
        """What goes wrong with one request must not end the thread that serves all of them."""
        try:
            yield
        except Exception as problem:
            log(f"{self._model}: {text}: {problem}")

    # ---------------------------------------------------------------- coming and going

    def _connect(self) -> None:
        """Connect and introduce this model. Raises OSError if nobody listens, LinkError if the engine refuses."""
        hello: Message = {"op": "hello", "model": self._model, "role": "view"}
        if self._owner:
            hello.update(role="owner", settings=self._wanted)
        self._decoder = Decoder()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(HELLO_TIMEOUT)
            self._directory.connect(sock)
            sock.sendall(encode(hello))
            reply = None
            while reply is None:
                data = sock.recv(1 << 16)
                if not data:
                    raise ConnectionResetError("the engine hung up")
                reply = next(self._decoder.feed(data), None)
            if reply.get("op") != "ready":
                raise LinkError(reply.get("error", "the engine refused the connection"))
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        self.facts = reply
        with self._lock:
            self._socket = sock

    def _connect_or_start(self) -> None:
        """Connect to the engine; start it if there is none. One model of the server does so at a time."""
        with open(self._directory.lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._connect()
            except OSError:
                self._starter.start()
                self._connect()

    def _await_owner(self) -> None:
        """Connect once the model that has the engine has loaded. Raises LinkError."""
        begin = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                self._connect()
                return
            waited = time.monotonic() - begin
            failure = self._directory.read_failure()
            if failure is not None:
                raise LinkError(f"the model {self._owner_name} did not load: {failure}")
            if waited > OWNER_APPEARS and not os.path.isdir(self._directory.path):
                raise LinkError(f"its engine is that of the model {self._owner_name}, which is not loaded; load it")
            if waited > self._timeout:
                raise LinkError(f"the engine of the model {self._owner_name} was not ready after {waited:.0f} s")
            time.sleep(0.1)

    def _write(self, message: Message) -> None:
        with self._lock:
            if self._socket is not None:
                self._send(encode(message))

    def _send(self, data: bytes) -> None:
        # What goes wrong here, the link's thread sees too, and answers what is in flight.
        with contextlib.suppress(OSError):
            assert self._socket is not None
            self._socket.sendall(data)
