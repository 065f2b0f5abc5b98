"""Parameters of OpenAI's requests, and ours beside them, as inputs of the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.gateway.errors import ApiError
from apar.runtime.serving.model_inputs import model_inputs

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "seed": "seed",
    "stop": "stop",
    # Beyond OpenAI's own; names of vLLM where it has one.
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_tokens",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "include_stop_str_in_output": "include_stop_in_output",
    "bad_words": "bad_words",
    "max_branch_tokens": "max_branch_tokens",
    "max_branches": "max_branches",
    "max_depth": "max_depth",
    "fork": "fork",
}
"""Field of a request -> parameter of SamplingParams."""
_OF_THE_GATEWAY = {"model", "stream", "stream_options", "n", "max_tokens", "logprobs", "branch_events", "timeout_ms"}
_OF_CHAT = {"messages", "max_completion_tokens", "top_logprobs"}
_OF_COMPLETIONS = {"prompt", "echo", "suffix", "best_of"}
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
}
"""Fields of OpenAI's that the answer's meaning does not hang on: read over."""
NO_OBJECT: Mapping[str, Any] = {}
"""Stands for an object that a request does not have."""
MISSPELT = 0.82
"""How alike an unknown field and a known one are taken for a misspelling."""


@dataclass(frozen=True, slots=True)
class Common:
    """What chat and completions requests share."""

    inputs: dict[str, Any]
    """Of the model, without the prompt."""
    stream: bool
    include_usage: bool
    branch_events: bool
    choices: int
    """`n`."""
    seed: int | None
    deadline: float
    """Seconds."""


def read_common(body: Mapping[str, Any], chat: bool, model_name: str, max_tokens: int, deadline: float) -> Common:
    """Check a request's fields; the model's inputs that they mean.

    `max_tokens`: where the request names none. `deadline`: the service's own, in seconds. Raises ApiError.
    """
    _check_names(body, chat)
    _check_model(body.get("model"), model_name)
    limit_name = "max_completion_tokens" if chat and body.get("max_completion_tokens") is not None else "max_tokens"
    limit = body.get(limit_name)
    values: dict[str, Any] = {"max_tokens": max_tokens if limit is None else limit}
    for name, parameter in _SAMPLING.items():
        if body.get(name) is not None:
            values[parameter] = body[name]
    if isinstance(values.get("seed"), int) and -(2**63) <= values["seed"] < 0:
        values["seed"] += 2**64  # OpenAI's seeds are signed
    if values.get("stop") == "" or values.get("stop") == []:
        del values["stop"]
    if values.get("top_k") == -1:
        values["top_k"] = 0  # how clients of vLLM write "no limit"
    params = _sampling(values, limit_name)
    inputs = model_inputs(params, values)
    stream = flag(body, "stream")
    options = _object(body, "stream_options")
    if options is not NO_OBJECT and not stream:
        raise invalid("stream_options", "stream_options is only allowed when stream is true")
    milliseconds = _whole(body, "timeout_ms", 1, 2**31 - 1)
    seconds = deadline if milliseconds is None else min(deadline, milliseconds / 1e3)
    return Common(
        inputs | {"timeout_ms": min(2**31 - 1, round(1e3 * seconds))},
        stream,
        flag(options, "include_usage", "stream_options.include_usage"),
        flag(body, "branch_events"),
        _whole(body, "n", 1, 128) or 1,
        params.seed,
        seconds,
    )


def flag(body: Mapping[str, Any], name: str, shown: str = "") -> bool:
    """A field that is true, false or absent. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise invalid(shown or name, f"{shown or name} must be true or false")
    return value


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """A 400 about a field that would change the answer and cannot be honoured."""
    return invalid(param, message, "unsupported_parameter")


def refuse_unsupported(body: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise ApiError where one of these fields is there and not empty."""
    for name, reason in reasons.items():
        if body.get(name) not in (None, [], {}, "", False, "none"):
            raise unsupported(name, f"{name} is not supported: {reason}")


def alternatives(body: Mapping[str, Any], name: str) -> int | None:
    """A number of alternatives for each token, 0 to 20, or None."""
    return _whole(body, name, 0, 20)


def _sampling(values: dict[str, Any], limit_name: str) -> SamplingParams:
    try:
        return SamplingParams.from_mapping(values)
    except RequestError as error:
        message = str(error)
        for name, parameter in [*_SAMPLING.items(), (limit_name, "max_tokens")]:
            if name != parameter:
                message = message.replace(parameter, name)
        first = message.split(" ", 1)[0]
        known = {*_SAMPLING, limit_name}
        raise invalid(first if first in known else None, message) from None


def _check_names(body: Mapping[str, Any], chat: bool) -> None:
    known = {*_SAMPLING, *_OF_THE_GATEWAY, *(_OF_CHAT if chat else _OF_COMPLETIONS)}
    for name in body:
        if name not in known and name not in _HARMLESS:
            near = difflib.get_close_matches(name[:64], known, n=1, cutoff=MISSPELT)
            if near:
                raise invalid(name[:64], f"unknown field {name[:64]!r}; did you mean {near[0]}?", "unknown_field")


def _check_model(model: Any, known: str) -> None:
    if not isinstance(model, str):
        raise invalid("model", f"model must be a string; this service has {known!r}")
    if model != known:
        raise ApiError(
            404,
            f"the model {model[:100]!r} does not exist; this service has {known!r}",
            code="model_not_found",
            param="model",
        )


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return NO_OBJECT
    if not isinstance(value, dict):
        raise invalid(name, f"{name} must be an object")
    return value


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(name, f"{name} must be a whole number from {low} to {high}")
    return value
