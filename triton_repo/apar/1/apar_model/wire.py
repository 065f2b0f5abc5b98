"""Messages between a model and the engine process: JSON objects, or lists of them, behind their length in bytes (four
bytes, big-endian)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct(">I")


def encode(message: Message) -> bytes:
    """A message as it is sent."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def join(messages: Iterable[Message]) -> list[Message]:
    """The same messages, with what a request says in several that bring nothing else said in the first of them."""
    found: list[Message] = []
    growing: dict[Any, tuple[str, Message] | None] = {}
    for message in messages:
        number = message.get("id")
        key = next((key for key in ("text", "ids") if key in message), "") if len(message) == 2 else ""
        earlier = growing.get(number)
        if key and earlier is not None and earlier[0] == key:
            earlier[1][key] += message[key]
            continue
        growing[number] = (key, message) if key else None
        found.append(message)
    return found


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes."""
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                return
            body = bytes(buffer[_LENGTH.size : end])
            del buffer[:end]
            message = json.loads(body)
            yield from message if isinstance(message, list) else [message]
