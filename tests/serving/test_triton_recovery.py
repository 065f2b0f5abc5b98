"""Processes that die: the engine's, the server's; and what is answered meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_grpc import Stream, text_of
from triton_service import WAIT_SECONDS, TritonService, process_tree

from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.repository import write_repository
from apar.runtime.serving.triton_server import TritonServer

QUESTION = "Name three rules for growing pumpkins."


def test_killed_with_64_in_flight(triton: TritonService, reference: LLM, questions: list[str]) -> None:
    """All are answered at once, each with exactly one last response; then the engine is there again."""
    restarts = triton.await_idle()["apar:engine_restarts_total"]
    finals, errors, reasons = [0] * 64, [], []
    with Stream(triton) as stream:
        for number in range(64):
            inputs = {"text_input": [[questions[number]]], "stream": [[True]], "ignore_eos": [[True]]}
            stream.send({**inputs, "max_tokens": np.array([[400]], np.int32)}, request_id=str(number))
        begun: set[str] = set()
        killed = 0
        while sum(finals) < 64:
            request, result, last, error = stream.take()
            if error:
                errors.append(error)
                continue
            finals[int(request)] += last
            reason = result.as_numpy("finish_reason")
            if reason is not None:
                reasons.append(reason[0])
            begun.add(request)
            if not killed and len(begun) == 8:  # the first of them may have ended by now
                killed = triton.kill_engine()
    assert finals == [1] * 64
    assert "engine_failed: the engine process ended while it worked on this request; send it again" in errors
    # Requests that a slow machine brings to the model only then are refused.
    assert {error.split(":")[0] for error in errors} <= {"engine_failed", "engine_unavailable"}
    assert len(errors) + len(reasons) == 64 and len(errors) > 32
    assert triton.await_engine(other_than=killed) != killed
    (wanted,) = reference.generate([QUESTION], SamplingParams(max_tokens=200))
    for model in ("apar", "ensemble", "tensorrt_llm_bls"):
        end = time.monotonic() + WAIT_SECONDS
        while True:  # each model finds the new engine by itself
            found = triton.generate({"text_input": QUESTION, "max_tokens": 200}, model)
            if "error" not in found or time.monotonic() > end:
                break
            assert found["error"].startswith("engine_unavailable: ")
        assert found["text_output"] == wanted.text
    triton.await_metrics(engine_ready=1, engine_restarts_total=restarts + 1)
    triton.await_idle()


def test_while_the_engine_is_down(triton: TritonService) -> None:
    """New requests are refused at once with a code that says so, and the metrics page says it too."""
    (place,) = triton.folder.glob("apar-*/*/apar/lock")
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever starts the engine must have it: so none is started for now
        killed = triton.kill_engine()
        triton.await_metrics(engine_ready=0)
        for model in ("apar", "ensemble"):
            error = triton.generate({"text_input": QUESTION}, model)["error"]
            assert error.split(":")[0] in ("engine_unavailable", "engine_failed")
    triton.await_engine(other_than=killed)
    triton.await_metrics(engine_ready=1)


def gone(pids: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return False
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_server(
    installed_server: TritonServer, tiny_engine: Path, tmp_path: Path, number: int
) -> None:
    """Not even the process of a model that waits for its answer, as `apar` does when it publishes numbers."""
    service = TritonService(installed_server, tmp_path, tiny_engine)
    with service:
        engine = service.engine_pid()
        started = process_tree(service.pid)
        assert engine in started and len(started) >= 5
        if number == signal.SIGKILL:
            os.kill(service.pid, signal.SIGSTOP)
            time.sleep(1.5)  # the engine reports twice a second
        os.kill(service.pid, number)
        service.await_exit(WAIT_SECONDS)
        end = time.monotonic() + WAIT_SECONDS
        while not gone(started):
            assert time.monotonic() < end, f"processes {started} outlive the server"
            time.sleep(0.1)


WRONG = {
    "unknown": ({"max_row": "5"}, "unknown parameter 'max_row'; did you mean max_rows?"),
    "engine": ({"engine": "/no/such/engine"}, "/no/such/engine is neither an engine directory nor a checkpoint"),
    "executor": ({"executor": "abacus"}, "there is no executor 'abacus'"),
    "options": ({"executor_options": '{"speed": 3}'}, "does not take these options"),
    "python": ({"engine_python": "/no/python"}, "engine_python is '/no/python', which is no program"),
    "no_apar": ({"engine_python": "cat"}, "the engine process ended with exit code"),
    "variable": ({"engine": "${NOT_SET_ANYWHERE}"}, "the environment variable NOT_SET_ANYWHERE is not set; set it"),
    "slow": ({"startup_timeout_s": "0.05"}, "the engine was not ready after 0.05 s; write more startup_timeout_s"),
    "orphan": ({"engine_of": "nobody"}, "parameters of the engine are to be written in the configuration of nobody"),
}


@pytest.fixture(scope="module")
def explicit(
    installed_server: TritonServer, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonService]:
    """A server that loads models when asked: those of the repository, and copies of `apar` with a wrong parameter."""
    folder = tmp_path_factory.mktemp("explicit")
    repository = folder / "models"
    write_repository(repository)
    for name, (parameters, _) in WRONG.items():
        copy_model(repository / "apar", repository / name, parameters)
    options = ("--model-control-mode=explicit",)
    with TritonService(installed_server, folder, tiny_engine, repository=repository, options=options) as service:
        yield service


def copy_model(source: Path, target: Path, parameters: dict[str, str]) -> None:
    shutil.copytree(source, target)
    config = target / "config.pbtxt"
    lines = [
        line
        for line in config.read_text(encoding="utf-8").splitlines()
        if not any(f'key: "{name}"' in line for name in parameters)
    ]
    for name, value in parameters.items():
        lines.append(f'parameters: {{ key: "{name}" value: {{ string_value: {json.dumps(value)} }} }}')
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")


def control_model(service: TritonService, model: str, action: str) -> dict[str, Any]:
    status, body = service.request("POST", f"/v2/repository/models/{model}/{action}", "{}")
    return {"status": status, **(json.loads(body) if body else {})}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_fail_the_load_with_a_sentence(explicit: TritonService, name: str) -> None:
    found = control_model(explicit, name, "load")
    assert found["status"] == 400 and WRONG[name][1] in found["error"]


def test_load_unload_and_load_again(explicit: TritonService, reference: LLM) -> None:
    """The engine comes with `apar` and goes with it; a model without an engine of its own says what it lacks."""
    found = control_model(explicit, "ensemble", "load")
    assert "its engine is that of the model apar, which is not loaded; load it" in found["error"]
    assert control_model(explicit, "apar", "load")["status"] == 200
    assert control_model(explicit, "ensemble", "load")["status"] == 200
    engine = explicit.engine_pid()
    assert engine is not None
    (wanted,) = reference.generate([QUESTION], SamplingParams(max_tokens=60))
    question = {"text_input": QUESTION, "max_tokens": 60}
    assert explicit.generate(question, "ensemble")["text_output"] == wanted.text
    (explicit.folder / "models" / "apar" / "1" / "model.py").touch()
    assert control_model(explicit, "apar", "load")["status"] == 200  # a new instance of the model keeps the engine
    assert explicit.generate(question)["text_output"] == wanted.text
    assert explicit.engine_pid() == engine
    tokens = explicit.await_idle()["apar:generation_tokens_total"]
    explicit.generate(question)
    explicit.await_metrics(engine_ready=1, generation_tokens_total=tokens + wanted.usage.completion_tokens)
    with Stream(explicit) as stream:  # what is in flight when the model is unloaded is finished
        inputs = {"text_input": [[QUESTION]], "max_tokens": np.array([[60]], np.int32), "stream": [[True]]}
        stream.send(inputs)
        first = stream.take()[1]
        assert control_model(explicit, "apar", "unload")["status"] == 200
        assert text_of([first, *stream.answer()]) == wanted.text
    end = time.monotonic() + WAIT_SECONDS
    while not gone([engine]):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert explicit.generate(question, "ensemble")["error"].split(":")[0] in ("engine_unavailable", "engine_failed")
    assert control_model(explicit, "apar", "load")["status"] == 200
    assert explicit.generate(question)["text_output"] == wanted.text
    assert explicit.engine_pid() not in (None, engine)
