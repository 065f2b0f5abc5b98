"""What is to be answered: prompts from arguments, a file, or standard input."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from apar.export.errors import RequestError

Messages = list[dict[str, str]]
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt: a text, or a conversation."""

    prompt: str | Messages
    name: str | None = None
    """The `id` of a JSON entry, for people and results."""

    @property
    def title(self) -> str:
        """The question on one line."""
        text = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content", ""))
        return " ".join(text.split())

    def with_system(self, system: str | None) -> PromptEntry:
        """As a conversation with this system message, unless it has one."""
        if system is None:
            return self
        turns = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        if _is_system(turns[:1]):
            return self
        return PromptEntry([{"role": "system", "content": system}, *turns], self.name)


def gather_prompts(arguments: Sequence[str], file: Path | None, stdin: TextIO) -> list[PromptEntry]:
    """Prompts in the order given; `-` is standard input, which is also read where nothing else is given.

    Raises RequestError where there is none, or the file holds none.
    """
    entries = [PromptEntry(_read(stdin) if text == "-" else _checked(text, "the prompt")) for text in arguments]
    if file is not None:
        entries += read_prompts(file, stdin)
    if not entries and not stdin.isatty():
        entries.append(PromptEntry(_read(stdin)))
    if not entries:
        raise RequestError("there is no prompt; give one as an argument, with --file, or on standard input")
    return entries


def read_prompts(path: Path, stdin: TextIO | None = None) -> list[PromptEntry]:
    """Prompts of a file: JSON lines or a JSON list of {"prompt"} or {"messages"}, or plain text, one prompt a line.

    A JSON list of messages ({"role", "content"}) is one conversation.

    Raises RequestError with the line's number where an entry is malformed.
    """
    try:
        text = _read(stdin) if str(path) == "-" and stdin is not None else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"prompts cannot be read from {path}: {error}") from error
    if text.lstrip().startswith("[") and (listed := _json_list(text)) is not None:
        if listed and all(isinstance(item, dict) and "role" in item for item in listed):
            listed = [{"messages": listed}]
        entries = [_entry(item, f"{path}, entry {i}") for i, item in enumerate(listed)]
    else:
        lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        entries = [_line(line, f"{path}, line {i}") for i, line in lines]
    if not entries:
        raise RequestError(f"{path} holds no prompt; give one a line, or JSON lines with `prompt` or `messages`")
    return entries


def _read(stdin: TextIO) -> str:
    return _checked(stdin.read(), "standard input").removeprefix("\ufeff").strip("\n")


def _checked(text: str, where: str) -> str:
    """`text`, if it was UTF-8: what was not is a lone surrogate in what Python gives us."""
    if odd := _NOT_UTF8.search(text):
        byte = ord(odd[0]) - 0xDC00
        raise RequestError(f"{where} is not UTF-8 text: it holds the byte 0x{byte:02X} after {odd.start()} characters")
    return text


def _is_system(turns: Sequence[Any]) -> bool:
    """Whether these turns begin with a system message; they may come from JSON and hold anything."""
    return bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") == "system"


def _json_list(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _line(line: str, where: str) -> PromptEntry:
    if not line.lstrip().startswith("{"):
        return PromptEntry(line.strip())
    try:
        return _entry(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: no JSON object ({error.msg}); a plain prompt must not begin with {{") from error
    except RecursionError as error:
        raise RequestError(f"{where}: the JSON object is nested too deep") from error


def _entry(item: Any, where: str) -> PromptEntry:
    if isinstance(item, str):
        return PromptEntry(item)
    if not isinstance(item, dict):
        raise RequestError(f"{where}: a prompt is a string or an object with `prompt` or `messages`")
    name = str(item["id"]) if "id" in item else None
    if isinstance(item.get("prompt"), str):
        return PromptEntry(item["prompt"], name)
    if isinstance(item.get("messages"), list):
        if not all(isinstance(message, dict) for message in item["messages"]):
            raise RequestError(f"{where}: `messages` must hold objects with `role` and `content`")
        return PromptEntry(item["messages"], name)
    raise RequestError(f"{where}: the object has neither a string `prompt` nor a list `messages`")
