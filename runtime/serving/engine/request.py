"""A `generate` message as token ids, sampling parameters and wishes about the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apar.export.errors import AparError, CapacityError, EngineStoppedError, RequestError
from apar.runtime.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from apar.runtime.serving.engine.wire import Message
from apar.runtime.text_engine import TextEngine

INVALID = "invalid_request"
CONTEXT = "context_exceeded"
OVERLOADED = "overloaded"
UNAVAILABLE = "engine_unavailable"
FAILED = "engine_failed"
DEADLINE = "deadline_exceeded"
CANCELLED = "cancelled"
INTERNAL = "internal"


def error_code(error: BaseException) -> str:
    """The code under which a client learns of an exception (docs/triton.md, "Errors")."""
    if isinstance(error, CapacityError):
        return CONTEXT
    if isinstance(error, RequestError):
        return INVALID
    return FAILED if isinstance(error, EngineStoppedError) else INTERNAL


@dataclass(slots=True)
class ServedRequest:
    """What a client asked for."""

    token_ids: list[int]
    params: SamplingParams
    label: str
    """The client's own id, by which it may be stopped; need not be unique."""
    priority: int
    arrived: float
    """By the engine's clock."""
    timeout: float | None
    """Seconds from then."""
    stream: bool
    events: bool
    ids: bool
    """The answer is wanted as token ids, not as text."""
    echo: str
    """Text in front of the answer."""
    echo_ids: bool
    """The prompt's ids are wanted in front of the answer."""


def parse_request(message: Message, text: TextEngine) -> ServedRequest:
    """Read a `generate` message. Raises RequestError where a value is not acceptable."""
    arrived = text.engine.clock()
    ids = message.get("ids") is not None
    token_ids = text.encode(_prompt(message), message.get("chat", True))
    values = dict(message.get("params", {}))
    if isinstance(values.get("logit_bias"), str):
        values["logit_bias"] = _json("logit_bias", values["logit_bias"])
    if "bias_words" in values:
        values["logit_bias"] = _word_bias(values.pop("bias_words"), values.get("logit_bias"), text)
    if "stop_sequences" in values:
        _add_stop_sequences(values, values.pop("stop_sequences"), text)
    timeout_ms = message.get("timeout_ms")
    if timeout_ms is not None and timeout_ms <= 0:
        raise RequestError(f"timeout_ms is {timeout_ms}, it must be at least 1")
    echo = message.get("text") or "" if message.get("echo") else ""
    return ServedRequest(
        token_ids=token_ids,
        params=SamplingParams.from_mapping(values),
        label=message.get("label", ""),
        priority=message.get("priority", 0),
        arrived=arrived,
        timeout=None if timeout_ms is None else timeout_ms / 1000,
        stream=message.get("stream", False),
        events=message.get("events", False),
        ids=ids,
        echo=echo,
        echo_ids=ids and message.get("echo", False),
    )


def _prompt(message: Message) -> Any:
    if message.get("ids") is not None:
        return message["ids"]
    messages, text, ids = message.get("messages"), message.get("text"), message.get("prompt_ids")
    if bool(text) + (messages is not None) + (ids is not None) > 1:
        raise RequestError("text_input, messages and input_ids are several prompts; give one of them")
    if ids is not None:
        return ids
    if messages is None:
        if text is None:
            raise RequestError("there is no prompt; give text_input, messages or input_ids")
        return text
    parsed = _json("messages", messages)
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        raise RequestError("messages must be a JSON list of {role, content} objects")
    return parsed


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON: {error}") from error


def _word_bias(words: Sequence[tuple[str, float]], given: Any, text: TextEngine) -> dict[Any, Any]:
    """`logit_bias` with the weight of each word added to every token of it, as tensorrtllm_backend does."""
    if len(words) > MAX_LOGIT_BIAS:
        raise RequestError(f"embedding_bias_words has {len(words)} entries, at most {MAX_LOGIT_BIAS} are allowed")
    bias: dict[Any, Any] = dict(given) if isinstance(given, dict) else {}
    for word, weight in words:
        for token in set(text.tokenizer.encode_text(word)):
            bias[token] = bias.get(token, 0.0) + weight
    return bias


def _add_stop_sequences(values: dict[str, Any], sequences: Sequence[Sequence[int]], text: TextEngine) -> None:
    """Stop sequences of one token are stop tokens; longer ones are stop strings: the text that they stand for."""
    tokens, strings = list(values.get("stop_token_ids", ())), list(values.get("stop", ()))
    for sequence in sequences:
        try:
            string = text.tokenizer.decode(sequence) if len(sequence) > 1 else ""
        except AparError as error:
            raise RequestError(f"stop_words_list: {error}") from error
        if string:
            strings.append(string)
        else:
            tokens += sequence
    values["stop_token_ids"], values["stop"] = tokens, strings
