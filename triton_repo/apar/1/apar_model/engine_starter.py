"""Starting the engine process and waiting until it is ready."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time

from apar_model.engine_directory import EngineDirectory, LinkError

END_TIMEOUT = 10.0
"""Seconds that a process which has said its last word may take to end."""


class EngineStarter:
    """Starts engine processes, one at a time.

    Args:
        python: interpreter that has apar installed.
        settings: parameters of the engine, as texts by name.
        directory: where the engine is to listen.
        timeout: seconds until it must be ready.
    """

    def __init__(self, python: str, settings: dict[str, str], directory: EngineDirectory, timeout: float) -> None:
        self._python = python
        self._settings = settings
        self._directory = directory
        self._timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start one and return when it is ready; one that was started before is ended. Raises LinkError."""
        self.kill()
        # As this Python writes names of files, whatever its locale.
        python = shutil.which(os.fsdecode(self._python.encode("utf-8", "surrogateescape")))
        if python is None:
            raise LinkError(
                f"engine_python is {self._python!r}, which is no program; write the Python interpreter that has apar "
                "installed"
            )
        with open(self._directory.settings, "w", encoding="utf-8") as file:
            json.dump({"settings": self._settings, "server": self._directory.server}, file)
        command = [python, "-m", "apar.runtime.serving.engine", self._directory.path]
        # The folder that the server runs in, such as a model repository, is not where the engine finds its modules.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        child = self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
        )
        line = self._status_line(child)
        try:
            status = json.loads(line)
        except ValueError:
            status = {}
        if status.get("ready"):
            return
        self.await_end(END_TIMEOUT)
        self.kill()
        if "error" in status:
            raise LinkError(status["error"])
        if line:
            raise LinkError(f"the engine process said {line[:200]!r} instead of being ready")
        raise LinkError(
            f"the engine process ended with exit code {child.returncode} before it was ready; its own words are above "
            f"in the server's log. Is apar installed for {python}? Try: {python} -m apar.runtime.cli --version"
        )

    def await_end(self, timeout: float) -> None:
        """Wait until the process that was started has ended, but not longer than `timeout` seconds."""
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout)

    def kill(self) -> None:
        """End the process that was started, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _status_line(self, child: subprocess.Popen[bytes]) -> bytes:
        """What the child says on standard output; b"" if it ends without a word. Raises LinkError at the timeout."""
        assert child.stdout is not None
        end = time.monotonic() + self._timeout
        line = b""
        with child.stdout as pipe:
            while not line.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0:
                    self.kill()
                    raise LinkError(f"the engine was not ready after {self._timeout:g} s; write more startup_timeout_s")
                if select.select([pipe], [], [], min(left, 1.0))[0]:
                    data = os.read(pipe.fileno(), 1 << 16)
                    if not data:
                        break
                    line += data
        return line
