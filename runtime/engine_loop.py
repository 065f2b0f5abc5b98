"""The thread that drives a text engine; other threads have it do things between two steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

from apar.export.errors import EngineStoppedError
from apar.runtime.answer import Answer
from apar.runtime.text_engine import TextEngine

logger = logging.getLogger(__name__)

CLOSED = "the engine has been closed; create a new one"


class EngineLoop:
    """Steps while there is work, and sleeps when there is none. It owns the engine from `start` on.

    Args:
        text: the engine; nobody else may touch it any more.
        deliver: called after a step with the answers that have new events or are finished, in the loop's thread.
        stopped: called once, in the loop's thread, when no step will follow: the reason in one sentence.
    """

    def __init__(
        self,
        text: TextEngine,
        deliver: Callable[[Sequence[Answer]], None],
        stopped: Callable[[str], None],
    ) -> None:
        self.text = text
        self.step_since: float | None = None
        """`time.monotonic()` when the step that is running began; None between steps."""
        self._deliver = deliver
        self._stopped = stopped
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="apar-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between two steps; its result or exception comes with the future."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if not self.post(run):
            future.set_exception(EngineStoppedError(self._failure or CLOSED))
        return future

    def post(self, command: Callable[[], None]) -> bool:
        """The same without an answer; an exception of `command` ends the loop. Returns False if the loop has ended."""
        with self._wake:
            if self._closing or self._failure is not None:
                return False
            self._commands.append(command)
            self._wake.notify()
            return True

    def close(self, timeout: float | None = None) -> bool:
        """Stop after the step that is running and free the engine; returns False if that took longer than `timeout`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._commands and self.text.idle and not self._closing:
                        self._wake.wait()
                    if self._closing:
                        break
                # One by one: if one of them ends the loop, the others are still to be told.
                for _ in range(len(self._commands)):
                    self._commands.popleft()()
                self.step_since = monotonic()
                try:
                    answers = self.text.step()
                finally:
                    self.step_since = None
                if answers:
                    self._deliver(answers)
        except BaseException as error:
            logger.exception("the engine loop died")
            self._failure = f"the engine stopped: {error}"
        finally:
            self._end()

    def _end(self) -> None:
        """Refuse whatever comes, say so, then free the engine."""
        with self._wake:
            self._failure = self._failure or CLOSED
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            _attempt(command)
        self._stopped(self._failure)
        self.text.close()


def _attempt(command: Callable[[], None]) -> None:
    """Run a command after the engine's end, when it may be in any state: nobody may be left waiting for that."""
    try:
        command()
    except Exception:
        logger.exception("a command failed after the engine's end")
