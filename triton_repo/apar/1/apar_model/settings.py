"""A model's parameters as config.pbtxt gives them: filled in from the environment, and sorted by whom they concern."""

from __future__ import annotations

import os
import re
from typing import Any

OWN_PARAMETERS = ("engine_of", "engine_python", "startup_timeout_s", "tensors", "chat", "exclude_input_in_output")
"""What the model itself reads; everything else goes to the engine, which knows its own."""

# Of the Python backend: not ours to read.
_BACKEND_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")


class ParameterError(Exception):
    """A parameter is wrong; the message says what to write."""


class ModelSettings:
    """Parameters of one model.

    Attributes:
        engine_of: the model whose engine answers; its own name if it has one itself.
        owner: whether this model starts the engine.
        engine_python: interpreter of the engine process.
        startup_timeout: seconds until the engine must be ready.
        ids: token ids in and out, instead of text.
        chat: whether a text is put into the chat template unless the request says otherwise.
        exclude_input: whether the prompt is left out of the answer unless the request says otherwise.
        engine: parameters of the engine, as texts.
    """

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        values = {}
        for key, value in parameters.items():
            if key not in _BACKEND_PARAMETERS:
                values[key] = fill(key, value["string_value"])
        self.engine_of = values.get("engine_of") or name
        self.owner = self.engine_of == name
        self.engine = {key: value for key, value in values.items() if key not in OWN_PARAMETERS}
        if self.engine and not self.owner:
            raise ParameterError(
                f"{', '.join(sorted(self.engine))}: the model {name} has no engine of its own, so parameters of the "
                f"engine are to be written in the configuration of {self.engine_of}; known here are "
                f"{', '.join(OWN_PARAMETERS)}"
            )
        self.engine_python = values.get("engine_python") or "python3"
        self.startup_timeout = _seconds("startup_timeout_s", values.get("startup_timeout_s") or "600")
        tensors = values.get("tensors") or "text"
        if tensors not in ("text", "ids"):
            raise ParameterError(f"tensors is {tensors!r}; write text or ids")
        self.ids = tensors == "ids"
        self.chat = _truth("chat", values.get("chat") or "true")
        self.exclude_input = _truth("exclude_input_in_output", values.get("exclude_input_in_output") or "true")


def fill(key: str, text: str) -> str:
    """`text` with every ${NAME} and ${NAME:-default} replaced from the environment."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environb.get(name.encode())
        if found:
            # The stub's Python takes them for ASCII where the server has no locale, as in most containers.
            return found.decode("utf-8", "surrogateescape")
        if default is None:
            raise ParameterError(f"{key} is {text!r}, but the environment variable {name} is not set; set it")
        return default

    filled = _VARIABLE.sub(value, text)
    if "${" in filled:
        raise ParameterError(f"{key} is {text!r}; write a value, ${{NAME}} or ${{NAME:-default}}")
    return filled.strip()


def _truth(key: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ParameterError(f"{key} is {text!r}; write true or false")
    return text.lower() == "true"


def _seconds(key: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ParameterError(f"{key} is {text!r}; write a number of seconds above 0")
    return seconds
