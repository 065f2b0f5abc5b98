"""One model's connection: a thread that reads its messages and one that writes ours."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterable

from apar.runtime.serving.engine.flight import Flight
from apar.runtime.serving.engine.wire import Decoder, Message, WireError, encode

logger = logging.getLogger(__name__)

SEND_BUFFER = 8 << 10
"""Bytes that may be under way. Small, so that a slow reader holds the writer up and answers are joined here."""
MOST_TOGETHER = 256
"""Messages that are sent as one."""
RECEIVE_SIZE = 256 << 10
_PEER: int | None = getattr(socket, "SO_PEERCRED", None)
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group of the other side (Linux, unix(7))."""


class Connection:
    """Takes messages in and sends what flights have to say, joined as far as the reader is behind.

    Args:
        sock: connected; the connection closes it.
        handle: called with every message, in the reading thread.
        closed: called once, when the other side is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[Connection, Message], None],
        closed: Callable[[Connection], None],
    ) -> None:
        self.role = ""
        """"owner" or "view" once the other side has said hello."""
        self.flights: dict[int, Flight] = {}
        """By number; belongs to the engine's thread."""
        self._socket = sock
        self._handle = handle
        self._on_close = closed
        self._wake = threading.Condition()
        self._messages: list[Message] = []
        self._due: dict[Flight, None] = {}
        self._closing = False
        self._said_all = threading.Event()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    @property
    def peer(self) -> int | None:
        """Process id of the other side, which is valid as long as the connection is open; None where it is unknown."""
        if _PEER is None:
            return None
        try:
            pid: int = _CREDENTIALS.unpack(self._socket.getsockopt(socket.SOL_SOCKET, _PEER, _CREDENTIALS.size))[0]
        except OSError:
            return None
        return pid or None

    def start(self) -> None:
        """Begin to read and to write."""
        for name, target in (("reader", self._read), ("writer", self._write)):
            threading.Thread(target=target, name=f"apar-{name}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message of its own, before what flights have to say."""
        with self._wake:
            self._messages.append(message)
            self._wake.notify()

    def send_from(self, flights: Iterable[Flight]) -> None:
        """These flights have something to say."""
        with self._wake:
            self._due.update(dict.fromkeys(flights))
            self._wake.notify()

    def close(self) -> None:
        """End both threads, after what is queued has been sent."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def finish(self, timeout: float) -> bool:
        """Close, and wait until what was queued has been sent; False if that took longer than `timeout` seconds."""
        self.close()
        return self._said_all.wait(timeout)

    def _read(self) -> None:
        decoder = Decoder()
        try:
            while data := self._socket.recv(RECEIVE_SIZE):
                for message in decoder.feed(data):
                    self._handle(self, message)
        except OSError:
            pass
        except WireError as error:
            logger.warning("a connection is closed, because it sent %s", error)
        finally:
            self.close()
            self._on_close(self)

    def _write(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._messages or self._due or self._closing):
                        self._wake.wait()
                    messages, self._messages = self._messages, []
                    due, self._due = self._due, {}
                    closing = self._closing
                messages += [said for flight in due if (said := flight.message()) is not None]
                for first in range(0, len(messages), MOST_TOGETHER):
                    self._socket.sendall(encode(messages[first : first + MOST_TOGETHER]))
                if closing and not messages:
                    return
        except OSError:
            logger.debug("a reader went away")
        finally:
            self._said_all.set()
            shut(self._socket)


def shut(sock: socket.socket) -> None:
    """Close a socket that another thread may be reading."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        sock.close()
