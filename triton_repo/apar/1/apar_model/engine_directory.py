"""Where the engine of a model has its socket, and how a model writes to the log."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile


class LinkError(Exception):
    """There is no engine; the message says why and what to do."""


def log(text: str) -> None:
    """One line in the server's log."""
    print(f"apar: {text}", file=sys.stderr, flush=True)


class EngineDirectory:
    """A directory that belongs to one model of one server: every model of that server finds it without being told,
    and nobody but the user may enter it.

    Attributes:
        path: of the directory.
        lock: locked while somebody starts the engine.
        failure: holds the reason why the engine could not be started.
        server: {"pid", "started"} of the server; together they name it for good.
    """

    def __init__(self, model: str) -> None:
        pid = os.getppid()
        self.server = {"pid": pid, "started": _start(pid)}
        self._root = os.path.join(tempfile.gettempdir(), f"apar-{os.getuid()}")
        # Containers may share the folder for temporary files, but not the numbers of processes.
        self._space = os.stat("/proc/self/ns/pid").st_ino
        self.path = os.path.join(self._root, f"{self._space}-{pid}-{self.server['started']}", model)
        self.lock = os.path.join(self.path, "lock")
        self.failure = os.path.join(self.path, "failure")
        self.settings = os.path.join(self.path, "settings.json")

    def create(self) -> None:
        """Make it, and remove those of servers that are gone. Raises LinkError if others could enter it."""
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        facts = os.lstat(self._root)
        if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or os.path.islink(self._root):
            raise LinkError(f"{self._root} must be a directory of this user that nobody else may enter; remove it")
        for name in os.listdir(self._root):
            if not self._in_use(name):
                shutil.rmtree(os.path.join(self._root, name), ignore_errors=True)
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        if os.path.exists(self.failure):
            os.remove(self.failure)

    def _in_use(self, name: str) -> bool:
        """Whether the server that a directory is named after still runs, as far as can be seen from here."""
        space, _, server = name.partition("-")
        pid, _, started = server.partition("-")
        if space != str(self._space):
            return True
        try:
            return _start(int(pid)) == started
        except (OSError, ValueError):
            return False

    def connect(self, sock: socket.socket) -> None:
        """Connect to the engine. Raises OSError if none listens."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            # By this way, because the address of a socket may not be longer than about 100 bytes.
            sock.connect(f"/proc/self/fd/{folder}/engine.sock")
        finally:
            os.close(folder)

    def read_failure(self) -> str | None:
        """Why the engine could not be started; None if nobody has failed."""
        try:
            with open(self.failure, encoding="utf-8") as file:
                return file.read()
        except OSError:
            return None

    def write_failure(self, text: str) -> None:
        """Tell the other models why there will be no engine."""
        with open(self.failure, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def _start(pid: int) -> str:
    """When a process began, in clock ticks after boot."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[19]
