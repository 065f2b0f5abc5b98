"""Request tensors to the engine's messages, and messages back to response tensors.

Names and types are those of config.pbtxt; docs/triton.md describes each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from apar_model.settings import ModelSettings

INVALID = "invalid_request"
MAX_LIST = 4096
"""Entries of a list, before the engine applies its own limit."""


class InputError(Exception):
    """A tensor's value is not acceptable; the message says why."""


# Tensor -> sampling parameter of the engine. Two names for one parameter: those of old and new clients.
_INTEGERS = {
    "max_tokens": "max_tokens",
    "request_output_len": "max_tokens",
    "max_branch_tokens": "max_branch_tokens",
    "min_tokens": "min_tokens",
    "min_length": "min_tokens",
    "top_k": "top_k",
    "runtime_top_k": "top_k",
    "seed": "seed",
    "random_seed": "seed",
    "logprobs": "logprobs",
    "max_branches": "max_branches",
    "max_depth": "max_depth",
}
_NUMBERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "runtime_top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_TRUTHS = {
    "fork": "fork",
    "ignore_eos": "ignore_eos",
    "include_stop_in_output": "include_stop_in_output",
}
# Accepted with the one value that they can have here.
_ONLY_ONE = ("beam_width", "num_return_sequences")
_NEVER = ("return_context_logits", "return_generation_logits")


class Inputs:
    """Tensors of one request by name."""

    def __init__(self, request: Any) -> None:
        self._arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def one(self, name: str, default: Any = None) -> Any:
        """The single value of a tensor as a Python object."""
        array = self._arrays.get(name)
        if array is None:
            return default
        if array.size != 1:
            raise InputError(f"{name} has {array.size} values, it must have one")
        return array.reshape(-1)[0].item() if array.dtype != object else array.reshape(-1)[0]

    def number(self, name: str) -> float:
        """The single value of a FP32 tensor as the shortest decimal that stands for it: 0.7, not 0.699999988."""
        value = self.one(name)
        return float(str(np.float32(value)))

    def text(self, name: str) -> str | None:
        """The single text of a STRING tensor, or None."""
        value = self.one(name)
        return None if value is None else _decode(name, value)

    def texts(self, name: str) -> list[str]:
        """Texts of a STRING tensor; empty ones, which clients send for "none", are left out."""
        array = self._list(name)
        return [_decode(name, value) for value in array if value]

    def values(self, name: str) -> list[Any]:
        """Values of a numeric tensor, flat."""
        return self._list(name).tolist()

    def prompt_ids(self, name: str) -> list[int]:
        """Values of a tensor that may be as long as a prompt."""
        array = self._arrays.get(name)
        if array is None:
            raise InputError(f"there is no prompt; give {name}")
        return array.reshape(-1).tolist()

    def pairs(self, name: str) -> list[list[int]]:
        """Sequences of token ids of a [2, n] tensor: their tokens, and where each ends; -1 pads the ends."""
        array = self._arrays.get(name)
        if array is None or array.size == 0:
            return []
        if array.size > 2 * MAX_LIST:
            raise InputError(f"{name} has {array.size // 2} entries, at most {MAX_LIST} are allowed")
        tokens, ends = array.reshape(2, -1).tolist()
        sequences: list[list[int]] = []
        start = 0
        for end in ends:
            if end == -1:
                break
            if not start < end <= len(tokens):
                raise InputError(f"{name}: the second row must hold growing ends of sequences of the first, then -1")
            sequences.append(tokens[start:end])
            start = end
        return sequences

    def _list(self, name: str) -> Any:
        array = self._arrays.get(name)
        if array is None:
            return np.zeros(0)
        if array.size > MAX_LIST:
            raise InputError(f"{name} has {array.size} entries, at most {MAX_LIST} are allowed")
        return array.reshape(-1)


def _decode(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def to_message(inputs: Inputs, request: Any, settings: ModelSettings) -> dict[str, Any]:
    """The engine's message for a request that wants an answer. Raises InputError."""
    for name in _ONLY_ONE:
        if inputs.one(name, 1) != 1:
            raise InputError(f"{name} is {inputs.one(name)}; this server gives one answer a request, write 1")
    for name in _NEVER:
        if inputs.one(name, False):
            raise InputError(f"{name} is true, but this server does not return logits; see logprobs")
    message = {
        "op": "generate",
        "label": request.request_id(),
        "params": _sampling(inputs),
        "chat": inputs.one("chat", settings.chat),
        "stream": inputs.one("streaming" if settings.ids else "stream", False),
        "events": inputs.one("branch_events", False),
        "echo": not inputs.one("exclude_input_in_output", settings.exclude_input),
        "priority": inputs.one("priority", 0),
        "timeout_ms": inputs.one("timeout_ms"),
    }
    if request.timeout() and message["timeout_ms"] is None:  # Triton's own, in microseconds
        message["timeout_ms"] = max(1, request.timeout() // 1000)
    if settings.ids:
        message["ids"] = _prompt_ids(inputs)
    else:
        message["text"] = inputs.text("text_input")
        message["messages"] = inputs.text("messages")
        if "input_ids" in inputs:
            message["prompt_ids"] = inputs.prompt_ids("input_ids")
    return message


def _prompt_ids(inputs: Inputs) -> list[int]:
    ids = inputs.prompt_ids("input_ids")
    if "input_lengths" in inputs:
        length = inputs.one("input_lengths")
        if not 0 <= length <= len(ids):
            raise InputError(f"input_lengths is {length}, but input_ids has {len(ids)} values")
        ids = ids[:length]
    return ids


def _sampling(inputs: Inputs) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for tensor, name in _INTEGERS.items():
        if tensor in inputs:
            params[name] = inputs.one(tensor)
    for tensor, name in _NUMBERS.items():
        if tensor in inputs:
            params[name] = inputs.number(tensor)
    if params.get("top_p") == 0:
        # NVIDIA's clients send 0 for "not set": then TensorRT-LLM samples among the top_k, or, without one, is greedy.
        del params["top_p"]
        params["top_k"] = params.get("top_k") or 1
    for tensor, name in _TRUTHS.items():
        if tensor in inputs:
            params[name] = inputs.one(tensor)
    if inputs.one("return_log_probs", False):
        params.setdefault("logprobs", 0)
    params["stop"] = inputs.texts("stop_words")
    params["bad_words"] = inputs.texts("bad_words")
    params["stop_token_ids"] = inputs.values("stop_token_ids")
    params["bad_words_ids"] = inputs.pairs("bad_words_list")
    params["stop_sequences"] = inputs.pairs("stop_words_list")
    end = inputs.one("end_id")
    if end == -1:
        params["ignore_eos"] = True
    elif end is not None:
        params["stop_token_ids"].append(end)
    if "logit_bias" in inputs:
        params["logit_bias"] = inputs.text("logit_bias")
    words, weights = inputs.texts("embedding_bias_words"), inputs.values("embedding_bias_weights")
    if words:
        if len(words) != len(weights):
            raise InputError(
                f"embedding_bias_words has {len(words)} words, embedding_bias_weights has {len(weights)} weights"
            )
        params["bias_words"] = list(zip(words, weights, strict=True))
    return {name: value for name, value in params.items() if value != []}
