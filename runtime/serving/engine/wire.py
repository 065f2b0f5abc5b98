"""Messages between the engine process and the models: JSON objects, or lists of them, behind their length in bytes
(four bytes, big-endian).

The models have the same few lines of their own (triton_repo/apar/1/apar_model/wire.py), since they run where `apar`
cannot be imported.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

LENGTH = struct.Struct(">I")
MAX_MESSAGE = 64 << 20
"""Bytes; what is longer cannot come from a model of ours."""

Message = dict[str, Any]


class WireError(Exception):
    """The other side does not speak this protocol."""


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(message: Message | list[Message]) -> bytes:
    """A message, or several in one, as it is sent."""
    body = _to_json(message).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes. Raises WireError."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= LENGTH.size:
                (size,) = LENGTH.unpack_from(buffer, start)
                if size > MAX_MESSAGE:
                    raise WireError(f"a message of {size} bytes")
                end = start + LENGTH.size + size
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + LENGTH.size : end])
                start = end
                try:
                    message = json.loads(body)
                except (ValueError, RecursionError) as error:
                    raise WireError(f"a message that is no JSON: {error}") from error
                several = message if isinstance(message, list) else [message]
                if not all(isinstance(one, dict) for one in several):
                    raise WireError("a message that is no object")
                yield from several
        finally:
            del buffer[:start]
