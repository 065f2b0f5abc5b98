"""The engine process: load, warm up, serve until nobody needs it."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from apar.export.errors import AparError
from apar.runtime.engine_source import resolve_engine
from apar.runtime.llm import load_text_engine
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.engine.connection import Connection
from apar.runtime.serving.engine.service import Service
from apar.runtime.serving.engine.settings import Settings, parse_settings
from apar.runtime.serving.engine.wire import Message
from apar.runtime.text_engine import TextEngine

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
SOCKET_NAME = "engine.sock"
PID_NAME = "engine.pid"
GRACE = 3.0
"""Seconds without an owner after which the process ends: as long as one takes to come back."""
FIRST_GRACE = 30.0
"""The same before the first owner has come."""
TICK = 0.5
MODELS_END = 3.0
"""Seconds that processes of models have to end when their server is gone; they look for it twice a second."""
SERVER_GONE = "the server is gone"
CLOSE_TIMEOUT = 5.0
MAX_FAILED_STEPS = 5
"""Steps that raised, one after the other, after which the fault is taken to be the engine's, not the requests'."""
EXIT_FAILED, EXIT_HANGS = 1, 3


class EngineProcess:
    """One engine, served on a socket in `directory`.

    Args:
        directory: holds `settings.json`: {"settings": {name: text}, "server": {"pid", "started"}}.
        status: where one line of JSON says that the engine is ready, or why it is not.
    """

    def __init__(self, directory: Path, status: TextIO) -> None:
        self._directory = directory
        self._status = status
        self._texts: dict[str, str] = {}
        self._server: dict[str, Any] = {}
        self._facts: Message = {}
        self._loaded = threading.Event()
        self._ended = threading.Event()
        self._reason = ""
        self._reporting = False
        self._owned = 0.0
        """`time.monotonic()` when it had an owner last."""

    def run(self) -> int:
        """Serve; returns the exit code."""
        try:
            given = json.loads((self._directory / SETTINGS_NAME).read_text(encoding="utf-8"))
            self._texts, self._server = given["settings"], given["server"]
            settings = parse_settings(self._texts)
            threading.Thread(target=self._guard_loading, name="apar-guard", daemon=True).start()
            started = time.monotonic()
            text = load_text_engine(
                resolve_engine(settings.engine),
                settings.executor,
                settings.limits,
                draft=settings.draft,
                served=True,
                **settings.options,
            )
            warm_up(text)
            # What is loaded stays: the garbage collector need not go through it again and again between steps.
            gc.collect()
            gc.freeze()
        except AparError as error:
            self._say({"error": str(error)})
            return EXIT_FAILED
        except Exception as error:
            logger.exception("the engine cannot be loaded")
            self._say({"error": f"the engine cannot be loaded: {type(error).__name__}: {error}"})
            return EXIT_FAILED
        self._engine = text.engine
        executor = self._engine.executor
        logger.info("engine ready after %.1f s: %s", time.monotonic() - started, executor.detail)
        self._service = Service(text, settings.max_requests, self._end)
        self._service.loop.start()
        listener = self._listen()
        self._facts = {
            "op": "ready",
            "pid": os.getpid(),
            "max_context": text.engine.scheduler.max_context,
            "vocab_size": executor.manifest.decoder.vocab_size,
            "detail": executor.detail,
        }
        threading.Thread(target=self._accept, args=(listener,), name="apar-accept", daemon=True).start()
        self._loaded.set()
        self._say({"ready": True})
        code = self._watch(settings)
        logger.info("engine process ends: %s", self._reason)
        listener.close()
        if self._reason == SERVER_GONE:
            self._end_models()
        if not self._service.close(CLOSE_TIMEOUT):
            code = EXIT_HANGS
        self._clean()
        return code

    def stop(self, *_: object) -> None:
        """End soon; usable as a signal handler."""
        self._end("it was told to")

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._ended.set()

    def _say(self, status: Message) -> None:
        self._status.write(json.dumps(status) + "\n")
        self._status.flush()
        self._status.close()

    def _listen(self) -> socket.socket:
        (self._directory / SOCKET_NAME).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(self._directory, os.O_RDONLY)
        # By this way, because the address of a socket may not be longer than about 100 bytes.
        listener.bind(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
        os.close(folder)
        listener.listen(16)
        (self._directory / PID_NAME).write_text(f"{os.getpid()}\n", encoding="ascii")
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self._service.serve(Connection(sock, self._handle, self._service.forget))

    def _handle(self, connection: Connection, message: Message) -> None:
        operation = message.get("op")
        if operation == "hello":
            difference = self._difference(message.get("settings"))
            if difference:
                connection.send({"op": "refused", "error": difference})
                connection.close()
                return
            connection.send(self._facts)  # first of all: as an owner it gets numbers from now on
            connection.role = message.get("role", "view")
            if connection.role == "owner":
                self._owned = time.monotonic()
        elif operation == "bye":
            connection.role = ""
            if not self._service.owners():
                self._end("its last owner said goodbye")
            connection.close()
        else:
            self._service.handle(connection, message)

    def _difference(self, settings: dict[str, str] | None) -> str:
        """What a model wants otherwise than this engine is; "" if nothing."""
        if settings is None:
            return ""
        for name in sorted({*settings, *self._texts}):
            mine, wanted = self._texts.get(name, ""), settings.get(name, "")
            if mine != wanted:
                return (
                    f"this model's engine runs with {name} {mine!r}, and the configuration now says {wanted!r}; "
                    "unload the model first, then load it"
                )
        return ""

    def _guard_loading(self) -> None:
        """A load may take minutes; it must not outlive the server."""
        while not self._loaded.wait(TICK):
            if self._ended.is_set() or not is_alive(self._server["pid"], self._server["started"]):
                os._exit(EXIT_FAILED)

    def _watch(self, settings: Settings) -> int:
        """Wait until the process is to end; report numbers and see to it that nothing hangs meanwhile."""
        code = 0
        begun = time.monotonic()
        while not self._ended.wait(TICK):
            now = time.monotonic()
            owners = self._service.owners()
            if owners:
                self._owned = now
                self._report()
            elif now > (self._owned + GRACE if self._owned else begun + FIRST_GRACE):
                self._end("no model of the server needs it any more")
            if not is_alive(self._server["pid"], self._server["started"]):
                self._end(SERVER_GONE)
            if self._engine.failed_steps >= MAX_FAILED_STEPS:
                self._end(f"{MAX_FAILED_STEPS} steps in a row failed")
                code = EXIT_FAILED
            since = self._service.loop.step_since
            if settings.step_timeout_s and since is not None and now - since > settings.step_timeout_s:
                logger.error("a step has been running for %d s; the engine hangs", now - since)
                faulthandler.dump_traceback()
                self._clean()
                os._exit(EXIT_HANGS)
        return code

    def _report(self) -> None:
        """Send numbers to the newest owner, unless the last ones are still to come."""
        if self._reporting:
            return
        self._reporting = True  # first: the loop may be done with it before `post` returns

        def report() -> None:
            owners = self._service.owners()
            if owners:
                owners[-1].send({"op": "metrics", **self._service.numbers()})
            self._reporting = False

        if not self._service.loop.post(report):
            self._reporting = False

    def _end_models(self) -> None:
        """See to it that the models' processes follow their server.

        They end by themselves, but for one that is waiting for the server's answer: it would wait for ever, with
        Python's lock in its hand, so that no thread of its own can end it.
        """
        end = time.monotonic() + MODELS_END
        while self._service.peers() and time.monotonic() < end:
            time.sleep(0.05)
        for pid in self._service.peers():
            logger.warning("the model's process %d hangs, its server is gone: it is killed", pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _clean(self) -> None:
        for name in (SOCKET_NAME, PID_NAME):
            (self._directory / name).unlink(missing_ok=True)


def warm_up(text: TextEngine) -> None:
    """Answer a few tokens, so that the first request meets memory that was touched and code that was run."""
    tokens = text.tokenizer.tokens
    prompt = [tokens.eos[0] if tokens.bos is None else tokens.bos]
    answer = text.submit(prompt, SamplingParams(max_tokens=4, ignore_eos=True), request_id="warm-up")
    while not text.idle:
        text.step()
    if answer.request.error:
        raise AparError(f"the engine cannot run: {answer.request.error}")
    text.metrics = type(text.metrics)()


def is_alive(pid: int, started: str) -> bool:
    """Whether the process `pid` that began at `started` (clock ticks after boot, as in /proc) still runs.

    It is taken for alive where that cannot be seen now, because too many files are open for example.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    fields = stat.rpartition(")")[2].split()
    return fields[0] not in "ZX" and fields[19] == started


def main(argv: list[str]) -> int:
    """Entry point of `python -m apar.runtime.serving.engine DIRECTORY`."""
    if len(argv) != 1:
        print("usage: python -m apar.runtime.serving.engine DIRECTORY", file=sys.stderr)
        return 2
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="apar engine: %(levelname)s: %(message)s", stream=sys.stderr)
    # Standard output carries the status line alone; whatever libraries print goes to the server's log.
    status = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    process = EngineProcess(Path(argv[0]), status)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the server's to handle
    signal.signal(signal.SIGTERM, process.stop)
    code = process.run()
    logging.shutdown()
    os._exit(code)  # threads of libraries must not hold the process up
