"""A peer's worker: a process that loads a model and measures steps when asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from apar.export.errors import ExecutorError
from apar.runtime.bench import peers
from apar.runtime.bench.peers import FORMATS, MODULES, OWN, PACKAGES
from apar.runtime.bench.peers.protocol import Task


class PeerUnavailable(ExecutorError):
    """A peer cannot be measured here; the message says why and what to do."""


class PeerProcess:
    """A loaded peer. Close it, or use it as a context manager.

    Raises PeerUnavailable where its packages are missing or it refuses the task.
    """

    def __init__(self, name: str, task: Task, python: str = sys.executable) -> None:
        """`python`: of the peers that are not apar's own."""
        if task.weights not in FORMATS.get(name, (task.weights,)):
            raise PeerUnavailable(
                f"{name} alone has no {task.weights} on a CPU; compare it with --format {' or '.join(FORMATS[name])}"
            )
        self.name = name
        self._room = Path(tempfile.mkdtemp(prefix="apar-peer-"))
        self._log = self._room / "log"
        environment = dict(os.environ)
        if name in OWN:
            python = sys.executable
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        else:
            _copy_workers(self._room)
            environment["PYTHONPATH"] = str(self._room)
        command = [python, "-m", "apar.runtime.bench.peers", MODULES[name]]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=self._room
                )
        except OSError as error:
            shutil.rmtree(self._room, ignore_errors=True)
            raise PeerUnavailable(f"{name}: {python} cannot be run ({error}); give another --peer-python") from error
        try:
            answer = self._ask(dataclasses.asdict(task))
            if "missing" in answer:
                raise PeerUnavailable(
                    f"{name}: {python} has no package {answer['missing']}; install it with: {python} -m pip install "
                    f"{PACKAGES.get(name, answer['missing'])}, or name a Python that has it with --peer-python"
                )
            self.detail = str(answer["ready"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, rows: int, steps: int) -> list[float]:
        """Seconds of each of `steps` steps of `rows` sequences. Raises PeerUnavailable where it fails."""
        return [float(seconds) for seconds in self._ask({"rows": rows, "steps": steps})["seconds"]]

    def close(self) -> None:
        """End the process. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # it went away first
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._room, ignore_errors=True)

    def _ask(self, content: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = b""
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            pass  # it is gone; what it left says why
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise PeerUnavailable(f"{self.name}: its process ended{': ' + last[0] if last else ''}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise PeerUnavailable(f"{self.name}: {answer['failed']}")
        return answer


def _copy_workers(room: Path) -> None:
    """Lay out the workers' package alone, so that nothing of this environment gets into the other one."""
    package = room / "apar" / "runtime" / "bench"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    target = package / "peers"
    target.mkdir()
    for path in Path(peers.__file__).parent.glob("*.py"):
        shutil.copy(path, target / path.name)
