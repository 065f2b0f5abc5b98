"""Services for tests: `apar serve` as users run it, as a process, with ways to look at it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import openai

from apar.runtime.serving import traces

START_SECONDS = 120.0
WAIT_SECONDS = 120.0
"""Patience with what takes a moment on a machine that has nothing else to do."""
ENGINE_OPTIONS = ("--threads", "1")


class ServedProcess:
    """`apar serve` with options of a test; ended, with everything it started, when the block is left."""

    def __init__(self, engine: Path, folder: Path, *options: str, **variables: str) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "urls.json"
        self.log = folder / "log"
        command = [sys.executable, "-m", "apar.runtime.cli", "serve", str(engine), *ENGINE_OPTIONS]
        command += ["--port", "0", "--urls", str(self._file), "--model-name", "tiny", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "CI": "1", "PYTHONPATH": python_path(), **variables},
                start_new_session=True,
            )
        self.urls: dict[str, Any] = {}
        self._identity = ""
        self._temporary = folder

    def __enter__(self) -> ServedProcess:
        end = time.monotonic() + START_SECONDS
        try:
            while not self._file.exists():
                assert self.process.poll() is None, f"the service ended:\n{self.said()}"
                assert time.monotonic() < end, f"the service did not start:\n{self.said()}"
                time.sleep(0.05)
            self.urls = json.loads(self._file.read_text())
            self._identity = self.identity()
            self._temporary = Path(variable(self.server_pid(), "TMPDIR"))
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def said(self) -> str:
        """Everything it has printed."""
        return self.log.read_text(errors="replace")

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """An OpenAI client of it, which does not try again by itself."""
        return openai.OpenAI(base_url=self.urls["openai"], api_key=key, max_retries=0, timeout=WAIT_SECONDS, **options)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the gateway."""
        host, port = self.urls["openai"].removeprefix("http://").removesuffix("/v1").split(":")
        return host, int(port)

    def get(self, path: str) -> bytes:
        """Body of a GET."""
        host, port = self.address
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=WAIT_SECONDS) as response:
            body: bytes = response.read()
        return body

    def metric(self, name: str, label: str = "") -> float:
        """Sum of a metric's series, those with `label` in them; 0 where it has none yet."""
        total = 0.0
        for line in self.get("/metrics").decode().splitlines():
            series, _, value = line.rpartition(" ")
            if (series == name or series.startswith(name + "{")) and label in series:
                total += float(value)
        return total

    def server_pid(self) -> int:
        """Process id of the Triton server."""
        found = [pid for pid in children(self.process.pid) if name_of(pid) == "tritonserver"]
        assert len(found) == 1, found
        return found[0]

    def engine_pid(self) -> int:
        """Process id of the engine."""
        found = [
            pid for pid in traces.processes_of(self._identity) if b"apar.runtime.serving.engine" in command_of(pid)
        ]
        assert len(found) == 1, found
        return found[0]

    def identity(self) -> str:
        """The mark of its processes."""
        return variable(self.server_pid(), traces.VARIABLE)

    def left_behind(self) -> list[str]:
        """Processes, shared memory and folders of it that are still there."""
        if not self._identity:  # it has not come far enough to have one
            return []
        left = [f"{pid} {command_of(pid)!r}" for pid in traces.processes_of(self._identity)]
        left += [str(self._temporary)] if self._temporary.exists() else []
        left += [file.name for file in traces.SHARED_MEMORY.iterdir() if self._identity in file.name]
        return left


def wait_for(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """The condition's value as soon as it is true; the last one after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.05)


def python_path() -> str:
    """Where the engine finds the executors of the tests, and whatever this process finds."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def children(parent: int) -> list[int]:
    """Process ids of direct children."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if traces.parent_of(pid) == parent]


def name_of(pid: int) -> str:
    """What the system calls a process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def variable(pid: int, name: str) -> str:
    """A variable in a process's environment."""
    pairs = (entry.partition("=") for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {key: value for key, _, value in pairs}[name]


def command_of(pid: int) -> bytes:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
