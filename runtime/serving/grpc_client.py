"""A client of the models over gRPC, with NVIDIA's tritonclient: requests on one stream, responses as they come."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from apar.runtime.serving.model_responses import (
    MODEL,
    UNAVAILABLE,
    ModelResponse,
    TritonError,
    model_error,
    read_response,
)

Values = Mapping[str, Any]
"""Inputs by name: a text, a number, a truth value, or a list of one kind."""


_DIRECT = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
"""A channel that takes no proxy: gRPC asks the one that `http_proxy` names even for this machine's own addresses."""


class GrpcClient:
    """Talks to one model of a Triton server.

    with GrpcClient("localhost:8001") as client:
        for response in client.stream({"text_input": "How do I grow tomatoes?", "branch_events": True}):
            print(response.text, end="")
    """

    def __init__(self, url: str, model: str = MODEL) -> None:
        self._client = triton.InferenceServerClient(url, channel_args=_DIRECT if _is_local(url) else None)
        self._model = model
        try:
            metadata = self._client.get_model_metadata(model)
        except InferenceServerException as error:
            self._client.close()
            raise TritonError(UNAVAILABLE, f"{url} does not serve {model}: {error.message()}") from error
        self._types: dict[str, str] = {tensor.name: tensor.datatype for tensor in metadata.inputs}

    def stream(self, values: Values, timeout: float = 600.0) -> Iterator[ModelResponse]:
        """Responses to one request; the last has `final`. Raises TritonError.

        Leaving the loop ends the request by a `stop` request. The gRPC call itself is never cancelled: NVIDIA's server
        2.51 does not survive many cancelled calls.
        """
        request_id = uuid4().hex
        came: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: came.put((result, error)))
        running = True
        try:
            self._send(dict(values) | {"stream": True}, request_id)
            while running:
                try:
                    result, error = came.get(timeout=timeout)
                except queue.Empty:
                    raise TritonError(UNAVAILABLE, f"nothing came for {timeout:g} s") from None
                if error is not None:
                    running = False
                    raise model_error(error.message())
                answer = result.get_response()
                running = not answer.parameters["triton_final_response"].bool_param
                if answer.outputs:
                    yield read_response(
                        {tensor.name: _plain(result.as_numpy(tensor.name)) for tensor in answer.outputs}
                    )
        finally:
            if running:
                self._send({"stop": True}, request_id)
            self._client.stop_stream()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, values: Values, request_id: str) -> None:
        tensors = [self._tensor(name, value) for name, value in values.items()]
        self._client.async_stream_infer(self._model, tensors, request_id=request_id, enable_empty_final_response=True)

    def _tensor(self, name: str, value: Any) -> triton.InferInput:
        """A value as a tensor of shape [1, n] with the type that the model gives the name."""
        if name not in self._types:
            raise TritonError("invalid_request", f"the model {self._model} has no input {name!r}")
        items = value if isinstance(value, list | tuple) else [value]
        if self._types[name] == "BYTES":
            array = np.array([[item.encode() for item in items]], dtype=np.object_)
        else:
            array = np.array([items], dtype=triton_to_np_dtype(self._types[name]))
        tensor = triton.InferInput(name, array.shape, self._types[name])
        tensor.set_data_from_numpy(array)
        return tensor


def _is_local(url: str) -> bool:
    host = url.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def _plain(array: np.ndarray[Any, Any]) -> Any:
    """A tensor as Triton's HTTP interface writes it: texts and numbers, one element without a list."""
    items = [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]
    return items[0] if len(items) == 1 else items
