"""What a busy server's texts cost a step: tokens noted in the engine's thread, and put into messages in another one."""

from __future__ import annotations

import json
import socket
import statistics
from collections.abc import Sequence
from itertools import cycle
from time import perf_counter

from apar.export.manifest import TokenIds
from apar.export.tokenizer_files import TOKENIZER_NAME
from apar.runtime.answer import Answer
from apar.runtime.bench.replay_server import ReplayServer
from apar.runtime.booking import StepReport
from apar.runtime.branch import Request
from apar.runtime.engine_source import tiny_checkpoint
from apar.runtime.executor.replay_script import BOS, CHILD, EOS, FORK, PAD
from apar.runtime.serving.engine.connection import Connection
from apar.runtime.serving.engine.flight import Flight
from apar.runtime.serving.engine.request import ServedRequest
from apar.runtime.serving.engine.wire import encode
from apar.runtime.text_engine import TextEngine
from apar.runtime.tokenizer import Tokenizer

WARM_UP = 300
"""Steps that are not counted: answers begin together and have to drift apart."""


def replay_tokenizer() -> Tokenizer:
    """The tiny model's vocabulary, with the control tokens of recorded answers."""
    definition = json.loads((tiny_checkpoint() / TOKENIZER_NAME).read_text(encoding="utf-8"))
    return Tokenizer(definition, TokenIds(fork=FORK, child=CHILD, eos=(EOS,), bos=BOS, pad=PAD))


def measure_texts(
    server: ReplayServer, tokenizer: Tokenizer, order: Sequence[int], rows: int, steps: int
) -> dict[str, float]:
    """Medians over `steps` steps of about `rows` rows, every answer streamed as text; microseconds.

    Returns `note_us_per_step`, `message_us_per_step` (text in reading order, as JSON) and `messages` a step. Closes
    nothing.
    """
    text = _TimedTextEngine(server.engine, tokenizer)
    flights: dict[Request, Flight] = {}
    trees = cycle(order)
    notes: list[float] = []
    sends: list[float] = []
    count = 0
    here, there = socket.socketpair()
    with here, there:
        connection = Connection(here, lambda *_: None, lambda _: None)
        for step in range(WARM_UP + steps):
            for _ in range(server.missing(rows)):
                _submit(text, server, next(trees), connection, flights)
            text.seconds = 0.0
            answers = text.step()
            began = perf_counter()
            for answer in answers:
                if answer.finished:
                    flights[answer.request].end()
            messages = [said for a in answers if (said := flights[a.request].message()) is not None]
            encode(messages)
            if step >= WARM_UP:
                notes.append(text.seconds)
                sends.append(perf_counter() - began)
                count += len(messages)
            for answer in answers:
                if answer.finished:
                    del flights[answer.request]
    return {
        "note_us_per_step": round(1e6 * statistics.median(notes), 2),
        "message_us_per_step": round(1e6 * statistics.median(sends), 2),
        "messages": round(count / steps, 1),
    }


def _submit(
    text: TextEngine, server: ReplayServer, tree: int, connection: Connection, flights: dict[Request, Flight]
) -> None:
    request = ServedRequest(
        token_ids=server.prompt(tree),
        params=server.params,
        label="",
        priority=0,
        arrived=0.0,
        timeout=None,
        stream=True,
        events=False,
        ids=False,
        echo="",
        echo_ids=False,
    )
    flight = Flight(1, connection, request, text.tokenizer)
    flight.answer = text.submit(request.token_ids, request.params, listens=flight.listens)
    flights[flight.answer.request] = flight


class _TimedTextEngine(TextEngine):
    """Measures what it does about tokens that came."""

    seconds = 0.0

    def _read(self, report: StepReport, now: float) -> dict[Request, Answer]:
        began = perf_counter()
        try:
            return super()._read(report, now)
        finally:
            self.seconds += perf_counter() - began
