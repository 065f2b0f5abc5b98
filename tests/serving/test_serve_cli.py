"""`apar serve` and `apar demo` as commands, and the example of NVIDIA's client."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_process import ServedProcess, wait_for

from apar.runtime.cli import main
from apar.runtime.cli.serve import default_model_name
from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.grpc_client import GrpcClient

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Give me four facts about owls."


@pytest.fixture(scope="module")
def service(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    """One service with Triton's own ports."""
    ports = [f"--triton-{name}-port=0" for name in ("grpc", "http", "metrics")]
    folder = tmp_path_factory.mktemp("service")
    with ServedProcess(tiny_engine, folder, "--triton-address", "127.0.0.1", *ports) as service:
        yield service


@pytest.fixture(scope="module")
def answer(tiny_engine: Path) -> str:
    """What `apar generate` says to the question."""
    with LLM(tiny_engine, threads=1) as llm:
        return llm.generate(QUESTION, SamplingParams(max_tokens=200))[0].text


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "CI": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def marked(mark: str) -> list[str]:
    """Command lines of live processes with this mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
    return found


class TestServe:
    def test_says_where_it_listens(self, service: ServedProcess) -> None:
        said = service.said()
        assert "the model 'tiny' is served" in said and "Let trusted clients only reach these ports" in said
        assert set(service.urls) == {
            "model", "pid", "openai", "health", "metrics", "triton_grpc", "triton_http", "triton_metrics",
        }  # fmt: skip
        for name in ("openai", "triton_grpc"):
            assert service.urls[name] in said

    def test_triton_is_closed_unless_asked_for(self, tiny_engine: Path, tmp_path: Path) -> None:
        with ServedProcess(tiny_engine, tmp_path / "plain") as plain:
            assert "triton_grpc" not in plain.urls and "own ports" not in plain.said()
            commands = [c for c in marked(f"APAR_SERVE_ID={plain.identity()}") if "tritonserver" in c]
            assert any("--allow-grpc=false" in c and "--http-address=127.0.0.1" in c for c in commands)

    @pytest.mark.parametrize("address", ["::1", "::"])
    def test_triton_at_an_ipv6_address(self, address: str, tiny_engine: Path, tmp_path: Path) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        ports = [f"--triton-{name}-port=0" for name in ("grpc", "http", "metrics")]
        with ServedProcess(tiny_engine, tmp_path / "served", "--triton-address", address, *ports) as served:
            for name in ("triton_grpc", "triton_http"):
                assert served.urls[name].startswith("[::1]:")
            host, port = served.urls["triton_http"].rsplit(":", 1)
            with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
                pass
            with GrpcClient(served.urls["triton_grpc"]) as client:
                responses = list(client.stream({"text_input": QUESTION, "max_tokens": 3}))
            assert responses[-1].final

    def test_model_that_does_not_load_says_why(self, tiny_engine: Path) -> None:
        arguments = ["serve", tiny_engine, "--port", "0", "--executor", "torch", "--graph", "native"]
        done = run("-m", "apar.runtime.cli", *arguments)
        assert done.returncode == 1
        assert "apar: error: the Triton server could not load model apar" in done.stderr
        assert "does not take these options" in done.stderr
        assert "Traceback" not in done.stderr

    def test_time_limit_of_the_start(self, tiny_engine: Path) -> None:
        mark = f"mark-{uuid.uuid4()}"
        arguments = ["serve", tiny_engine, "--port", "0", "--startup-timeout", "0.2"]
        done = run("-m", "apar.runtime.cli", *arguments, APAR_MARK=mark)
        assert done.returncode == 1 and "was not ready after 0.2 s" in done.stderr
        assert wait_for(lambda: not marked(mark)), marked(mark)

    def test_no_server(self, tmp_path: Path, tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["serve", str(tiny_engine), "--port", "0", "--tritonserver", str(tmp_path)]) == 1
        assert "is no tritonserver" in capsys.readouterr().err

    def test_port_in_use(self, tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["serve", str(tiny_engine), "--port", port]) == 1
            assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
            options = ["--port", "0", "--triton-address", "127.0.0.1", "--triton-grpc-port", port]
            assert main(["serve", str(tiny_engine), *options, "-q"]) == 1
            assert "choose another with --triton-grpc-port" in capsys.readouterr().err

    def test_folders_that_the_servers_shell_takes_apart(self, tiny_engine: Path, tmp_path: Path) -> None:
        folder = tmp_path / "two words"
        folder.mkdir()
        done = run("-m", "apar.runtime.cli", "serve", tiny_engine, "--port", "0", TMPDIR=str(folder))
        assert done.returncode == 1 and not any(folder.iterdir())
        assert "starts no model from a path with ' ' in it; choose another folder for it with TMPDIR" in done.stderr

    def test_a_link_gives_its_own_name_to_the_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "engine-7").mkdir()
        (tmp_path / "current").symlink_to(tmp_path / "engine-7")
        monkeypatch.chdir(tmp_path / "engine-7")
        for engine, name in (
            ("../current", "current"),
            ("../current/", "current"),
            (".", "engine-7"),
            ("tiny", "tiny"),
        ):
            assert default_model_name(engine) == name

    def test_too_few_open_files(self, tiny_engine: Path) -> None:
        command = f"ulimit -n 300; exec {sys.executable} -m apar.runtime.cli serve {tiny_engine} --port 0"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "may hold only 300 files open, and 256 answers at once take 640" in done.stderr

    @pytest.mark.parametrize(
        ("options", "code", "said"),
        [
            (["--api-key", ""], 2, "an API key is empty"),
            (["--api-key-file", "/no/such/file"], 1, "cannot read the keys"),
            (["--api-key-file", "/dev/null"], 1, "holds no key"),
            (["--deadline", "0"], 2, "not above 0"),
            (["--executor", "abacus"], 2, "there is no executor 'abacus'"),
            (["--port", "70000"], 2, "not between 0 and 65535"),
            (["--urls", "/no/such/urls.json"], 2, "there is no directory /no/such to write urls.json to"),
            (["--max-rows", "8", "--max-step-tokens", "4"], 2, "max_step_tokens"),
        ],
    )
    def test_wrong_options(
        self, options: list[str], code: int, said: str, tiny_engine: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["serve", str(tiny_engine), *options]) == code
        assert said in capsys.readouterr().err


class TestDemo:
    def test_builds_serves_asks_and_ends(self, answer: str, tmp_path: Path) -> None:
        mark = f"mark-{uuid.uuid4()}"
        done = run(
            "-m", "apar.runtime.cli", "demo", "--max-tokens", "200", APAR_MARK=mark, APAR_CACHE=str(tmp_path / "cache")
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == answer + "\n"
        assert "branches" in done.stderr and "the service has ended" in done.stderr
        assert wait_for(lambda: not marked(mark)), marked(mark)

    def test_events_of_several_questions(self, tmp_path: Path) -> None:
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
        command = ["-m", "apar.runtime.cli", "demo", QUESTION, "Hm?", "--events", "--max-tokens", "30", "-q"]
        done = run(*command, **proxies)  # which are for other machines
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert {event["request"] for event in events} == {0, 1}
        assert sum(event["event"] == "result" for event in events) == 2
        assert not done.stderr

    def test_service_that_does_not_start(self, tmp_path: Path) -> None:
        done = run("-m", "apar.runtime.cli", "demo", "--tritonserver", tmp_path)
        assert done.returncode == 1 and "is no tritonserver" in done.stderr and not done.stdout


class TestExample:
    def test_grpc_and_http(self, service: ServedProcess, answer: str) -> None:
        script = ROOT / "scripts" / "tritonclient_example.py"
        over_grpc = run(script, QUESTION, "--url", service.urls["triton_grpc"], "--max-tokens", "200")
        assert (over_grpc.returncode, over_grpc.stdout) == (0, answer + "\n"), over_grpc.stderr
        for more in ([], ["--stream"]):
            over_http = run(script, QUESTION, "--http", service.urls["triton_http"], "--max-tokens", "200", *more)
            assert (over_http.returncode, over_http.stdout) == (0, answer + "\n"), over_http.stderr
        nowhere = run(script, QUESTION, "--url", "127.0.0.1:1")
        assert nowhere.returncode == 1 and "error: 127.0.0.1:1 does not serve apar" in nowhere.stderr
