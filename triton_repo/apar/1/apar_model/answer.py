"""One request's way back: messages of the engine as responses of Triton."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

# Code of an error -> Triton's error code, which decides the HTTP status of /generate.
_TRITON_CODES = {
    "invalid_request": "INVALID_ARG",
    "context_exceeded": "INVALID_ARG",
    "overloaded": "UNAVAILABLE",
    "engine_unavailable": "UNAVAILABLE",
    "engine_failed": "INTERNAL",
    "deadline_exceeded": "CANCELLED",
    "cancelled": "CANCELLED",
    "internal": "INTERNAL",
}
_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "branches", "steps")


class Answer:
    """Sends responses, and the last one exactly once.

    Args:
        request: Triton's, decoupled.
        ids: whether the answer is token ids.
    """

    def __init__(self, request: Any, ids: bool) -> None:
        self.asked_to_end = False
        """Whether the engine was told that the caller is gone."""
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self._ids = ids
        self._log_probs = False

    def want_log_probs(self) -> None:
        """The caller asked for return_log_probs."""
        self._log_probs = True

    def is_cancelled(self) -> bool:
        """Whether the caller has gone. Not to be called after the last response."""
        return bool(self._sender.is_cancelled())

    def message(self, message: dict[str, Any]) -> None:
        """Pass on what the engine said; the last time with "final" or "stopped" in it."""
        last = "final" in message or "stopped" in message
        response = pb_utils.InferenceResponse(output_tensors=self._tensors(message))
        self._sender.send(response, flags=FINAL if last else 0)

    def error(self, code: str, text: str) -> None:
        """End the request with an error."""
        name = _TRITON_CODES.get(code, "INTERNAL")
        error = pb_utils.TritonError(f"{code}: {text}", getattr(pb_utils.TritonError, name))
        # In two: an error that is also the last response never reaches a model that calls this one (BLS).
        self._sender.send(pb_utils.InferenceResponse(error=error))
        self._sender.send(flags=FINAL)

    def _tensors(self, message: dict[str, Any]) -> list[Any]:
        tensors: list[Any] = []

        def add(name: str, values: Any, dtype: Any, shape: tuple[int, ...] | None = None) -> None:
            if name in self._wanted:
                array = np.array(values, dtype=dtype)
                tensors.append(pb_utils.Tensor(name, array if shape is None else array.reshape(shape)))

        if self._ids:
            ids = message.get("ids", ())
            add("output_ids", ids, np.int32, (1, 1, -1))
            add("sequence_length", [[len(ids)]], np.int32)
        else:
            add("text_output", [message.get("text", "").encode()], object)
        events = message.get("events")
        if events:
            self._add_events(add, events)
        if self._log_probs and "cumulative" in message:
            logprobs = [entry["logprob"] for entry in message.get("logprobs", ())]
            add("cum_log_probs", [[message["cumulative"]]], np.float32)
            add("output_log_probs", logprobs, np.float32, (1, 1, -1))
        if "logprobs" in message:
            add("logprobs", [_json(message["logprobs"])], object)
        final = message.get("final")
        if final:
            add("finish_reason", [final["finish_reason"].encode()], object)
            for name in _COUNTS:
                add(name, [final[name]], np.int32)
            add("seed", [final["seed"]], np.uint64)
        return tensors

    def _add_events(self, add: Any, events: dict[str, list[Any]]) -> None:
        add("event", [kind.encode() for kind in events["event"]], object)
        for name in ("branch_id", "parent_id", "depth"):
            add(name, events[name], np.int32)
        add("event_step", events["step"], np.int32)
        add("event_tokens", [len(ids) for ids in events["ids"]], np.int32)
        if self._ids:
            add("event_ids", [token for ids in events["ids"] for token in ids], np.int32)
        else:
            add("event_text", [text.encode() for text in events["text"]], object)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
