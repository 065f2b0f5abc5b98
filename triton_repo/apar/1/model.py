"""A Triton model that answers with APAR's engine. Needs NumPy below 2 only: the engine runs in a process of its own.

`execute` parses, passes on and returns; responses are sent by the thread of `engine_link`. docs/triton.md of APAR
describes the models, their tensors and parameters.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from typing import Any

import triton_python_backend_utils as pb_utils
from apar_model.answer import Answer
from apar_model.engine_directory import LinkError, log
from apar_model.engine_link import EngineLink
from apar_model.engine_metrics import EngineMetrics
from apar_model.settings import ModelSettings, ParameterError
from apar_model.tensors import INVALID, InputError, Inputs, to_message


class TritonPythonModel:
    """The models `apar`, `ensemble`, `tensorrt_llm_bls` (text) and `tensorrt_llm` (token ids)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find or start the engine; returns when it is ready."""
        _leave_with_the_server()
        name = args["model_name"]
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._metrics: EngineMetrics | None = None
        try:
            self._settings = ModelSettings(name, parameters)
            self._link = EngineLink(name, self._settings, self._on_numbers, self._on_change)
            self._link.open()
        except (ParameterError, LinkError, OSError) as error:
            text = f"model {name}: {error}".encode("utf-8", "backslashreplace")  # a path may be no text
            raise pb_utils.TritonModelException(text.decode()) from None
        if self._settings.owner:  # not earlier: what a model that fails to load has registered stays for ever
            metrics = EngineMetrics(name)
            metrics.level("engine_ready", 1)
            metrics.count("engine_restarts_total", 0)
            self._metrics = metrics
        log(f"{name}: ready, {self._link.facts.get('detail', '')}")

    def execute(self, requests: list[Any]) -> None:
        """Pass requests on to the engine; whatever is wrong with one is answered to that one alone."""
        for request in requests:
            answer = Answer(request, self._settings.ids)
            try:
                problem = self._submit(request, answer)
            except InputError as error:
                problem = (INVALID, str(error))
            except Exception as error:
                log(traceback.format_exc())
                problem = ("internal", f"the request could not be passed on: {type(error).__name__}")
            if problem is not None:
                answer.error(*problem)

    def finalize(self) -> None:
        """Leave the engine, which ends if no other model needs it."""
        self._link.close()

    def is_ready(self) -> bool:
        """Asked by servers that know this method (2.51 does not)."""
        return self._link.ready

    def _submit(self, request: Any, answer: Answer) -> tuple[str, str] | None:
        inputs = Inputs(request)
        if inputs.one("stop", False):
            return self._link.submit({"op": "stop", "label": request.request_id()}, answer)
        if inputs.one("return_log_probs", False):
            answer.want_log_probs()
        return self._link.submit(to_message(inputs, request, self._settings), answer)

    def _on_numbers(self, numbers: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.level("engine_ready", 1)
            self._metrics.update(numbers)

    def _on_change(self, up: bool) -> None:
        if self._metrics is not None:
            if up:
                self._metrics.count("engine_restarts_total")
            self._metrics.level("engine_ready", int(up))


def _leave_with_the_server() -> None:
    """End this process when the server is gone: a server that was killed leaves its models' processes behind."""
    server = os.getppid()

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="apar-watch", daemon=True).start()
