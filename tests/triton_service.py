"""A real Triton server on the model repository, for tests: started, asked over HTTP, watched, ended without a trace."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apar.runtime
from apar.runtime.serving.repository import repository_source, write_repository
from apar.runtime.serving.triton_server import TritonServer

START_SECONDS = 120.0
WAIT_SECONDS = 120.0
"""Patience with what takes a moment on a machine that has nothing else to do."""
TESTS = Path(__file__).parent


class TritonService:
    """One server. Use as a context manager; entering it returns when the server is ready.

    Args:
        server: the installed server.
        folder: for its log and its temporary files.
        engine: what the model `apar` runs.
        parameters: of the models, written into a copy of the repository; without them the shipped one is served.
        environment: further variables.
        repository: another one.
        options: further options of the server.
    """

    def __init__(
        self,
        server: TritonServer,
        folder: Path,
        engine: Path,
        parameters: dict[str, str] | None = None,
        environment: dict[str, str] | None = None,
        repository: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        self.http_port = self.grpc_port = self.metrics_port = 0
        self.folder = folder
        self.log = folder / "server.log"
        folder.mkdir(parents=True, exist_ok=True)
        if parameters:
            repository = folder / "repository"
            write_repository(repository, parameters)
        self._prefix = f"apar_test_{secrets.token_hex(6)}_"
        self._command = server.command(
            f"--model-repository={repository or repository_source()}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--metrics-address=127.0.0.1",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            *options,
        )
        # The engine's interpreter is this one; it finds apar, and the executors of the tests, where this one does.
        places = [str(TESTS), str(Path(apar.runtime.__file__).parent.parent.parent), os.environ.get("PYTHONPATH", "")]
        self._environment = {
            **server.environment(),
            "APAR_ENGINE": str(engine),
            "APAR_PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "TMPDIR": str(folder),
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TritonService:
        self.start()
        try:
            self.await_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def grpc_url(self) -> str:
        """For tritonclient."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """For tritonclient."""
        return f"127.0.0.1:{self.http_port}"

    def start(self) -> None:
        """Start the server on ports that are free now, and return at once."""
        self.http_port, self.grpc_port, self.metrics_port = ports = _free_ports(3)
        options = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, *options],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self) -> None:
        """Wait until every model is ready."""
        end = time.monotonic() + START_SECONDS
        while not self.is_ready():
            assert self._process is not None
            if self._process.poll() is not None and "already in use" in self.log_tail():
                self.start()  # somebody else was quicker
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server did not become ready; its log ends:\n{self.log_tail()}")
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """What the server says of itself."""
        try:
            return self.request("GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False

    def await_exit(self, seconds: float) -> int:
        """Wait until the server has ended by itself; returns its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def end(self) -> None:
        """Stop the server and whatever is left of it."""
        process = self._process
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(12)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for region in Path("/dev/shm").glob(f"{self._prefix}*"):
            region.unlink(missing_ok=True)

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    # ---------------------------------------------------------------- the engine process

    def engine_pid(self) -> int | None:
        """Process id of the engine that serves now."""
        for path in self.folder.glob("apar-*/*/apar/engine.pid"):
            with contextlib.suppress(OSError, ValueError):
                return int(path.read_text(encoding="ascii"))
        return None

    def kill_engine(self) -> int:
        """kill -9 the engine process."""
        pid = self.engine_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return pid

    def await_engine(self, other_than: int | None = None, seconds: float = WAIT_SECONDS) -> int:
        """Wait for an engine (another one than `other_than`) that answers; returns its process id."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid = self.engine_pid()
            if pid is not None and pid != other_than:
                reply = self.generate({"text_input": "Hello?", "max_tokens": 1})
                if "error" not in reply:
                    return pid
            time.sleep(0.1)
        raise AssertionError(f"the engine did not come back; the log ends:\n{self.log_tail()}")

    # ---------------------------------------------------------------- requests

    def generate(self, inputs: dict[str, Any], model: str = "apar") -> dict[str, Any]:
        """One response over HTTP `generate`."""
        return dict(json.loads(self.post(inputs, model, "generate")[1]))

    def post(self, inputs: Any, model: str = "apar", endpoint: str = "generate") -> tuple[int, bytes]:
        """Status and body; `inputs` is JSON, or bytes as they are to be sent."""
        body = inputs if isinstance(inputs, bytes) else json.dumps(inputs)
        return self.request("POST", f"/v2/models/{model}/{endpoint}", body)

    def stream(self, inputs: dict[str, Any], model: str = "apar") -> Iterator[dict[str, Any]]:
        """Responses over HTTP `generate_stream` as they come; closing the iterator closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=120)
        with contextlib.closing(connection):
            flag = "streaming" if model == "tensorrt_llm" else "stream"
            body = json.dumps({flag: True, **inputs})
            connection.request(
                "POST", f"/v2/models/{model}/generate_stream", body, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            while line := response.readline():  # an error that comes first has status 400, and this form all the same
                if line.strip():
                    yield json.loads(line.removeprefix(b"data:"))

    def metrics(self) -> dict[str, float]:
        """Every value of the metrics page whose name begins with `apar:`, by name and labels but `model`."""
        page = self.request("GET", "/metrics", port=self.metrics_port)[1].decode()
        found = {}
        for line in page.splitlines():
            if line.startswith("apar:"):
                name, value = line.rsplit(" ", 1)
                found[re.sub(r'model="[^"]*",?', "", name).removesuffix("{}").replace(",}", "}")] = float(value)
        return found

    def await_metrics(self, seconds: float = WAIT_SECONDS, **wanted: float) -> dict[str, float]:
        """Wait until the metrics have these values (names without `apar:`); returns all of them."""
        end = time.monotonic() + seconds
        while True:
            found = self.metrics()
            if all(found.get(f"apar:{name}") == value for name, value in wanted.items()):
                return found
            if time.monotonic() > end:
                shown = {name: found.get(f"apar:{name}") for name in wanted}
                raise AssertionError(f"metrics are {shown}, not {wanted}, after {seconds} s")
            time.sleep(0.1)

    def await_numbers(self, seconds: float = WAIT_SECONDS) -> dict[str, float]:
        """Metrics with all that the engine has counted up to this call, which takes its next report."""
        asked, end = time.time(), time.monotonic() + seconds
        while self.metrics().get("apar:numbers_timestamp_seconds", 0.0) <= asked:
            assert time.monotonic() < end, f"the engine has reported no numbers for {seconds} s"
            time.sleep(0.05)
        return self.metrics()  # the page before may have been read while it was written

    def await_idle(self, seconds: float = WAIT_SECONDS) -> dict[str, float]:
        """Wait until nothing runs and every block is free; returns the metrics with all that was counted up to then."""
        names = ("num_requests_running", "num_requests_waiting", "num_branches_live", "kv_blocks_used")
        end = time.monotonic() + seconds
        while True:
            found = self.await_numbers(seconds)
            busy = {name: found[f"apar:{name}"] for name in names if found[f"apar:{name}"]}
            if not busy:
                return found
            assert time.monotonic() < end, f"the engine is still busy after {seconds} s: {busy}"

    def request(self, method: str, path: str, body: str | bytes | None = None, port: int = 0) -> tuple[int, bytes]:
        """Status and body of any request to the server's HTTP port, or to another one."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http_port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()


def in_threads(count: int, function: Any) -> list[Any]:
    """`function(i)` for i below `count`, each in a thread of its own; results in order, the first exception raised."""
    results: list[Any] = [None] * count
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = function(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a request hangs"
    if failures:
        raise failures[0]
    return results


def process_tree(pid: int) -> list[int]:
    """Processes that `pid` started, and those that these started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found += [int(entry.name), *process_tree(int(entry.name))]
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
