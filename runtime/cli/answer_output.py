"""What `apar generate` prints while and after it decodes: JSON, events, plain text, or the live view."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from apar.runtime.cli.prompts import PromptEntry
from apar.runtime.outputs import BranchEvent, DeltaEvent, ForkEvent, RequestOutput
from apar.runtime.reading_order import ReadingOrderStream

if TYPE_CHECKING:
    from apar.runtime.answer import Answer
    from apar.runtime.terminal import LiveTerminal
    from apar.runtime.text_engine import TextEngine


class AnswerOutput(ABC):
    """Prints answers. `prompts` and `answers` go together, in order."""

    def __init__(self, prompts: Sequence[PromptEntry], answers: Sequence[Answer]) -> None:
        self.prompts = prompts
        self.answers = answers
        self._printed = 0

    @abstractmethod
    def take(self, answer: Answer, engine: TextEngine) -> None:
        """An answer has new events, or is finished."""

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """All has been said."""

    def drop(self) -> None:  # noqa: B027
        """An exception ended the run."""

    def __enter__(self) -> AnswerOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.drop()

    def finished_in_order(self) -> list[tuple[PromptEntry, RequestOutput]]:
        """Finished answers that have not been printed and follow no unfinished one."""
        found = []
        while self._printed < len(self.answers) and self.answers[self._printed].finished:
            found.append((self.prompts[self._printed], self.answers[self._printed].output()))
            self._printed += 1
        return found


class JsonOutput(AnswerOutput):
    """One object a prompt, in order."""

    def take(self, answer: Answer, engine: TextEngine) -> None:
        """See AnswerOutput.take."""
        for entry, output in self.finished_in_order():
            _print_json(result_json(entry, output))


class EventsOutput(AnswerOutput):
    """Every event as it comes, and each answer's result when it is finished."""

    def take(self, answer: Answer, engine: TextEngine) -> None:
        """See AnswerOutput.take."""
        for event in answer.take_events():
            _print_json(event_json(event))
        if answer.finished:
            entry = self.prompts[self.answers.index(answer)]
            _print_json({"event": "result", **result_json(entry, answer.output())})


class PlainOutput(AnswerOutput):
    """Text as soon as it is certain; of several answers one after another."""

    def __init__(self, prompts: Sequence[PromptEntry], answers: Sequence[Answer], figures: bool) -> None:
        super().__init__(prompts, answers)
        self._figures = figures
        self._streams = {answer.request.request_id: ReadingOrderStream() for answer in answers}
        self._held: dict[str, list[str]] = {request_id: [] for request_id in self._streams}
        self._complete: set[str] = set()
        """Requests of which every event has been taken."""

    def take(self, answer: Answer, engine: TextEngine) -> None:
        """See AnswerOutput.take."""
        request_id = answer.request.request_id
        self._held[request_id] += [self._streams[request_id].feed(event) for event in answer.take_events()]
        if answer.finished:
            self._complete.add(request_id)
        while self._printed < len(self.answers):
            current = self.answers[self._printed]
            held = self._held[current.request.request_id]
            write_text("".join(held))
            held.clear()
            if current.request.request_id not in self._complete:
                return
            write_text("\n" if self._printed == len(self.answers) - 1 else "\n\n")
            report(self.prompts[self._printed], current.output(), self._figures, len(self.answers) > 1)
            self._printed += 1


class LiveOutput(AnswerOutput):
    """The live view, then the texts and figures."""

    def __init__(self, prompts: Sequence[PromptEntry], answers: Sequence[Answer]) -> None:
        from rich.console import Console

        from apar.runtime.terminal import LiveTerminal, TerminalView

        super().__init__(prompts, answers)
        titles = [(a.request.request_id, entry.title) for a, entry in zip(answers, prompts, strict=True)]
        self._view = TerminalView(titles)
        self._live: LiveTerminal = LiveTerminal(self._view, Console(stderr=True))

    def __enter__(self) -> AnswerOutput:
        self._live.__enter__()
        return self

    def take(self, answer: Answer, engine: TextEngine) -> None:
        """See AnswerOutput.take."""
        for event in answer.take_events():
            self._view.feed(event)
        cache = engine.engine.cache
        self._view.kv_used, self._view.kv_total = cache.num_referenced, cache.num_blocks
        self._live.refresh()

    def close(self) -> None:
        """See AnswerOutput.close."""
        self.drop()
        several = len(self.answers) > 1
        for entry, output in self.finished_in_order():
            if several:
                write_text(f"\033[1m{_printable(entry.title)}\033[0m\n\n", safe=True)
            write_text(output.text + ("\n\n" if several else "\n"))
            report(entry, output, figures=True, named=several)
            if several:
                print(file=sys.stderr)

    def drop(self) -> None:
        """See AnswerOutput.drop."""
        self._live.__exit__(None, None, None)


def make_output(options: argparse.Namespace, prompts: Sequence[PromptEntry], answers: Sequence[Answer]) -> AnswerOutput:
    """The form that the options and the terminal ask for."""
    if options.json:
        return JsonOutput(prompts, answers)
    if options.events:
        return EventsOutput(prompts, answers)
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if options.view == "live" or (options.view == "auto" and terminal and not options.quiet):
        return LiveOutput(prompts, answers)
    return PlainOutput(prompts, answers, figures=not options.quiet)


def event_json(event: BranchEvent) -> dict[str, Any]:
    """An event as a JSON object; its kind is `event`."""
    kind = "fork" if isinstance(event, ForkEvent) else "delta" if isinstance(event, DeltaEvent) else "finish"
    return {"event": kind, **dataclasses.asdict(event)}


def result_json(entry: PromptEntry, output: RequestOutput) -> dict[str, Any]:
    """Everything in a RequestOutput, with what was asked."""
    asked = {"prompt": entry.prompt} | ({"id": entry.name} if entry.name is not None else {})
    return asked | dataclasses.asdict(output)


def figures_line(output: RequestOutput) -> str:
    """Branches, tokens, steps, their ratio, and time."""
    tokens, steps, seconds = output.usage.completion_tokens, output.timing.steps, output.timing.total
    count = len(output.branches)
    ratio = f" ({tokens / steps:.2f} a step; plain decoding takes {tokens} steps)" if steps else ""
    rate = f", {tokens / seconds:.0f} tokens/s" if seconds else ""
    return (
        f"{count} {'branch' if count == 1 else 'branches'}, {tokens} tokens in {steps} steps{ratio}, "
        f"{seconds:.2f} s{rate}, at most {output.peak_kv_blocks} KV blocks"
        + (f", ended by {output.finish_reason}" if output.finish_reason != "stop" else "")
    )


def report(entry: PromptEntry, output: RequestOutput, figures: bool, named: bool) -> None:
    """Say on standard error how an answer went; a failure in any case."""
    name = f"{_printable(entry.title)[:40]}: " if named else ""
    sys.stdout.flush()
    if output.error:
        print(f"apar: error: {name}{output.error}", file=sys.stderr)
    if figures:
        line = f"{name}{figures_line(output)}"
        dim = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        print(f"\033[2m{line}\033[0m" if dim else line, file=sys.stderr)


def write_text(text: str, safe: bool = False) -> None:
    """Write an answer's text; on a terminal without anything that would steer it."""
    if not text:
        return
    sys.stdout.write(_printable(text) if sys.stdout.isatty() and not safe else text)
    sys.stdout.flush()


def _printable(text: str) -> str:
    from apar.runtime.terminal_parts import printable

    return printable(text)


def _print_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
