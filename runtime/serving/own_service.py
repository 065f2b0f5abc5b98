"""A service of one's own for a while: for the demo and for measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apar.export.errors import ServingError
from apar.runtime.serving import launch

START_SECONDS, STOP_SECONDS = 600.0, 60.0
OPEN_TRITON = ("--triton-address=127.0.0.1", *(f"--triton-{name}-port=0" for name in ("grpc", "http", "metrics")))
"""Options with which Triton's own ports are open on this machine."""


@contextmanager
def own_service(engine: str, *options: str, debug: bool = False, quiet: bool = True) -> Iterator[dict[str, Any]]:
    """`apar serve ENGINE OPTION...` on free ports while the block runs; what its `--urls` writes.

    Raises ServingError where it does not start, or does not end in order. debug: its log goes to standard error.
    """
    with tempfile.TemporaryDirectory(prefix="apar-") as folder:
        file, log = Path(folder) / "urls.json", Path(folder) / "log"
        command = [sys.executable, "-m", "apar.runtime.cli", "serve", engine, "-q", "--port", "0"]
        command += ["--urls", str(file), *options, *(["--debug"] if debug else [])]
        # It ends with this process, however that ends, and does not hear the terminal's Ctrl-C by itself.
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(int(signal.SIGTERM))]
        with log.open("wb") as said:
            errors = None if debug else said
            process = subprocess.Popen(
                [*launcher, *command], stdin=subprocess.DEVNULL, stdout=said, stderr=errors, start_new_session=True
            )
        try:
            yield _wait(process, file, log, quiet=quiet)
        except BaseException:
            _end(process)
            raise
        if _end(process) != 0:
            raise ServingError(f"the service did not end in order (exit code {process.returncode}):\n{_read(log)}")


def _wait(process: subprocess.Popen[bytes], file: Path, log: Path, quiet: bool) -> dict[str, Any]:
    """The service's URLs, once it answers."""
    if not quiet:
        print("apar: starting the service ...", file=sys.stderr)
    end = time.monotonic() + START_SECONDS
    while not file.exists():
        if process.poll() is not None:
            raise ServingError(f"the service did not start: {_read(log)}")
        if time.monotonic() > end:
            raise ServingError(f"the service did not answer within {START_SECONDS:g} s:\n{_read(log)}")
        time.sleep(0.05)
    urls: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return urls


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _read(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(line.removeprefix("apar: error: ") for line in lines[-15:])
