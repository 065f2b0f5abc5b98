"""Answers that come over gRPC, drawn live in a terminal or printed as text or events."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from apar.runtime.serving.grpc_client import GrpcClient
from apar.runtime.serving.model_responses import FAILED, BranchStep, Final, ModelResponse, TritonError

Come = tuple[int, "ModelResponse | TritonError"]


def show_answers(
    url: str, requests: Sequence[tuple[str, dict[str, Any]]], form: str = "auto", pace: float = 0.0
) -> list[Final]:
    """Ask for answers, at the same time, and show them as they come; returns their figures.

    requests: title and inputs of each. form: `live` draws the branches; `text` prints the texts, one after another;
    `events` prints a JSON object for each event; `auto` is live on a terminal and text elsewhere. pace: seconds that a
    step of the
    engine takes on the screen at least. Raises TritonError where an answer fails.
    """
    if form == "auto":
        form = "live" if sys.stdout.isatty() and sys.stderr.isatty() else "text"
    came: queue.Queue[Come] = queue.Queue()
    for index, (_, inputs) in enumerate(requests):
        threading.Thread(target=_ask, args=(url, index, inputs, came), daemon=True).start()
    texts = [""] * len(requests)
    finals: list[Final | None] = [None] * len(requests)
    with ExitStack() as stack:
        screen = _Screen(requests, form, pace, stack)
        while None in finals:
            index, response = came.get()
            if isinstance(response, TritonError):
                raise response
            texts[index] += response.text
            finals[index] = response.final
            screen.take(index, response)
    done = [final for final in finals if final is not None]
    if form != "events":
        _print_texts(requests, texts, done)
    return done


def figures_line(final: Final) -> str:
    """Branches, tokens, steps and their ratio."""
    tokens, steps = final.completion_tokens, final.steps
    ratio = f" ({tokens / steps:.2f} a step; plain decoding takes {tokens} steps)" if steps else ""
    ended = "" if final.finish_reason == "stop" else f", ended by {final.finish_reason}"
    branches = "1 branch" if final.branches == 1 else f"{final.branches} branches"
    return f"{branches}, {tokens} tokens in {steps} steps{ratio}{ended}"


class _Screen:
    """Shows what comes, in one of the forms."""

    def __init__(
        self, requests: Sequence[tuple[str, dict[str, Any]]], form: str, pace: float, stack: ExitStack
    ) -> None:
        self._form = form
        self._pace = pace
        self._step = -1
        if form == "live":
            from rich.console import Console

            from apar.runtime.terminal import LiveTerminal, TerminalView

            self._view = TerminalView([(str(index), title) for index, (title, _) in enumerate(requests)])
            self._live = stack.enter_context(LiveTerminal(self._view, Console(stderr=True)))

    def take(self, index: int, response: ModelResponse) -> None:
        """Show one response."""
        if self._form == "text":
            return
        for event in response.events:
            if self._form == "events":
                print(json.dumps(_event_object(index, event), ensure_ascii=False), flush=True)
                continue
            if self._pace and event.step > self._step:
                self._step = event.step
                self._live.refresh()
                time.sleep(self._pace)
            self._view.feed(event.event(str(index)))
        if self._form == "live":
            self._live.refresh()
        elif response.final is not None:
            result = {"event": "result", "request": index, **_fields(response.final)}
            print(json.dumps(result, ensure_ascii=False), flush=True)


def _ask(url: str, index: int, inputs: dict[str, Any], came: queue.Queue[Come]) -> None:
    try:
        with GrpcClient(url) as client:
            for response in client.stream(inputs):
                came.put((index, response))
    except TritonError as error:
        came.put((index, error))
    except Exception as error:
        came.put((index, TritonError(FAILED, f"the client failed: {error}")))


def _print_texts(requests: Sequence[tuple[str, Any]], texts: Sequence[str], finals: Sequence[Final]) -> None:
    from apar.runtime.terminal_parts import printable

    for (title, _), text, final in zip(requests, texts, finals, strict=True):
        if len(requests) > 1:
            print(printable(title) + "\n")
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
        print(figures_line(final), file=sys.stderr)


def _event_object(index: int, event: BranchStep) -> dict[str, Any]:
    return {"event": event.kind, "request": index, **{k: v for k, v in _fields(event).items() if k != "kind"}}


def _fields(item: BranchStep | Final) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}
