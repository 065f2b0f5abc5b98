"""Requests of all connections over one engine loop: admission, stops, cancellation, answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from apar.export.errors import AparError
from apar.runtime.answer import Answer
from apar.runtime.engine_loop import EngineLoop
from apar.runtime.serving.engine.connection import Connection
from apar.runtime.serving.engine.flight import Error, Flight
from apar.runtime.serving.engine.request import (
    CANCELLED,
    FAILED,
    INTERNAL,
    INVALID,
    OVERLOADED,
    UNAVAILABLE,
    ServedRequest,
    error_code,
    parse_request,
)
from apar.runtime.serving.engine.wire import Message
from apar.runtime.text_engine import TextEngine

logger = logging.getLogger(__name__)

LAST_WORDS_TIMEOUT = 2.0
"""Seconds that models have to read how their requests ended, when the engine stops."""


class Service:
    """Serves the models' messages.

    Everything about flights happens in the engine's thread; connections' threads only read, parse and write.

    Args:
        text: the engine; the service closes it.
        max_requests: held at once; more are refused.
        stopped: called with the reason when the engine's loop has ended.
    """

    def __init__(self, text: TextEngine, max_requests: int, stopped: Callable[[str], None]) -> None:
        self._text = text
        self._max_requests = max_requests
        self._on_stop = stopped
        self._flights: dict[str, Flight] = {}
        """By the engine's request id."""
        self._errors: dict[str, int] = {}
        """Requests that ended with an error, by code."""
        self._reported: dict[str, int] = {}
        """Totals of the counters when they were reported last."""
        self._numbers = count()
        self._connections: dict[Connection, None] = {}
        self._lock = threading.Lock()
        self.loop = EngineLoop(text, self._deliver, self._stopped)

    # ---------------------------------------------------------------- connections

    def serve(self, connection: Connection) -> None:
        """Take a new connection."""
        with self._lock:
            self._connections[connection] = None
        connection.start()

    def owners(self) -> list[Connection]:
        """Connections of models that keep the engine alive, the newest last."""
        with self._lock:
            return [connection for connection in self._connections if connection.role == "owner"]

    def peers(self) -> list[int]:
        """Process ids of the models that are connected."""
        with self._lock:
            found = {connection.peer for connection in self._connections}
        return sorted(pid for pid in found if pid is not None)

    def forget(self, connection: Connection) -> None:
        """The other side is gone: end what it asked for."""
        with self._lock:
            self._connections.pop(connection, None)
        self.loop.post(lambda: self._abandon(connection))

    def close(self, timeout: float) -> bool:
        """Stop the engine; requests still in flight end with an error, of which their models are told.

        False if stopping the engine took longer than `timeout` seconds.
        """
        closed = self.loop.close(timeout)
        with self._lock:
            connections = list(self._connections)
        end = time.monotonic() + LAST_WORDS_TIMEOUT
        for connection in connections:
            connection.finish(max(0.0, end - time.monotonic()))
        return closed

    def handle(self, connection: Connection, message: Message) -> None:
        """A message of a model, in its connection's thread."""
        operation = message.get("op")
        number = message.get("id", 0)
        if operation == "generate":
            self._generate(connection, number, message)
        elif operation == "cancel":
            self.loop.post(lambda: self._cancel(connection, number))
        elif operation == "stop":
            label = message.get("label", "")
            if not self.loop.post(lambda: self._stop(connection, number, label)):
                connection.send({"id": number, "error": (UNAVAILABLE, "the engine is stopping")})
        else:
            logger.warning("a message with the unknown operation %r was ignored", operation)

    # ---------------------------------------------------------------- in a connection's thread

    def _generate(self, connection: Connection, number: int, message: Message) -> None:
        error: Error
        try:
            request = parse_request(message, self._text)
        except AparError as problem:
            error = (error_code(problem), str(problem))
        except Exception as problem:  # a defect must not end the connection, which others use
            logger.exception("a request could not be read")
            error = (INTERNAL, f"the request could not be read: {problem}")
        else:
            if self.loop.post(lambda: self._submit(connection, number, request)):
                return
            error = (UNAVAILABLE, "the engine is stopping")
        self._refuse(connection, number, error)

    # ---------------------------------------------------------------- in the engine's thread

    def _submit(self, connection: Connection, number: int, request: ServedRequest) -> None:
        if len(self._flights) >= self._max_requests:
            self._refuse(
                connection, number, (OVERLOADED, f"{self._max_requests} requests are in flight already; send it later")
            )
            return
        flight = Flight(number, connection, request, self._text.tokenizer)
        request_id = f"{next(self._numbers)}"
        try:
            flight.answer = self._text.submit(
                request.token_ids,
                request.params,
                request_id=request_id,
                listens=flight.listens,
                priority=request.priority,
                arrived=request.arrived,
                timeout=request.timeout,
            )
        except AparError as problem:
            self._refuse(connection, number, (error_code(problem), str(problem)))
            return
        except Exception as problem:
            logger.exception("a request could not be queued")
            self._refuse(connection, number, (INTERNAL, f"the request could not be queued: {problem}"))
            return
        self._flights[request_id] = connection.flights[number] = flight

    def _refuse(self, connection: Connection, number: int, error: Error) -> None:
        self._count(error)
        connection.send({"id": number, "error": error})

    def _deliver(self, answers: Iterable[Answer]) -> None:
        """Tell connections which answers have something to say."""
        due: dict[Connection, list[Flight]] = {}
        for answer in answers:
            flight = self._flights.get(answer.request.request_id)
            if flight is None:
                continue
            if answer.finished:
                flight.end()
                self._remove(flight)
                if flight.error is not None:
                    self._count(flight.error)
            elif not flight.request.stream:
                continue
            due.setdefault(flight.connection, []).append(flight)
        for connection, flights in due.items():
            connection.send_from(flights)

    def _end(self, flight: Flight, error: Error | None) -> None:
        """End a request that still runs: with an error, or with what it has said so far."""
        assert flight.answer is not None
        answer = self._text.cancel(flight.answer.request.request_id)
        if answer is None:
            return
        if error is None:
            self._deliver([answer])
            return
        self._remove(flight)
        self._fail(flight, error)

    def _fail(self, flight: Flight, error: Error) -> None:
        flight.fail(error)
        self._count(error)
        flight.connection.send_from([flight])

    def _count(self, error: Error) -> None:
        with self._lock:
            self._errors[error[0]] = self._errors.get(error[0], 0) + 1

    def _remove(self, flight: Flight) -> None:
        assert flight.answer is not None
        del self._flights[flight.answer.request.request_id]
        del flight.connection.flights[flight.number]

    def _cancel(self, connection: Connection, number: int) -> None:
        flight = connection.flights.get(number)
        if flight is not None:
            self._end(flight, (CANCELLED, "the caller went away"))

    def _abandon(self, connection: Connection) -> None:
        for flight in list(connection.flights.values()):
            self._end(flight, (CANCELLED, "the caller went away"))

    def _stop(self, connection: Connection, number: int, label: str) -> None:
        if not label:
            error = (INVALID, "stop needs the id of the request to be stopped as its own request id")
            self._refuse(connection, number, error)
            return
        flights = [flight for flight in self._flights.values() if flight.request.label == label]
        for flight in flights:
            self._end(flight, None)
        connection.send({"id": number, "stopped": len(flights)})

    def _stopped(self, reason: str) -> None:
        """The loop has ended: answer what is still in flight."""
        for flight in list(self._flights.values()):
            self._remove(flight)
            self._fail(flight, (FAILED, "the engine ended while it worked on this request; send it again"))
        self._on_stop(reason)

    def numbers(self) -> dict[str, Any]:
        """For a model's metrics: gauges, and what was counted and observed since the last call; in the engine's thread.

        Increments, because the model that is told may have been loaded after the engine.
        """
        snapshot = self._text.metrics.snapshot(self._text.engine)
        with self._lock:
            errors = {f'request_errors_total{{code="{code}"}}': number for code, number in self._errors.items()}
        totals = snapshot.counters | errors
        increments = {name: total - self._reported.get(name, 0) for name, total in totals.items()}
        self._reported = totals
        return {
            "time": time.time(),
            "gauges": snapshot.gauges,
            "counters": increments,
            "observations": snapshot.observations,
        }
