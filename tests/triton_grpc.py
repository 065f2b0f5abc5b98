"""tritonclient's gRPC streams, for tests."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from triton_service import TritonService

TYPES = {np.dtype(np.int32): "INT32", np.dtype(np.float32): "FP32", np.dtype(bool): "BOOL", np.dtype(object): "BYTES"}
TYPES[np.dtype(np.uint64)] = "UINT64"


class Stream:
    """One long-lived gRPC stream; answers are told apart by request id."""

    def __init__(self, service: TritonService) -> None:
        self._client = grpcclient.InferenceServerClient(service.grpc_url)
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.stop_stream()
        self._client.close()

    def send(self, inputs: dict[str, Any], model: str = "apar", request_id: str = "", outputs: Any = None) -> None:
        tensors = []
        for name, values in inputs.items():
            array = np.array(values)
            if array.dtype.kind in "US":
                array = array.astype(object)
            tensor = grpcclient.InferInput(name, array.shape, TYPES[array.dtype])
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        self._client.async_stream_infer(
            model, tensors, request_id=request_id, outputs=outputs, enable_empty_final_response=True
        )

    def take(self) -> tuple[str, Any, bool, str]:
        """Request id, response, whether it is the last, and the error if it is one."""
        result, error = self._answers.get(timeout=120)
        if error is not None:
            return "", None, False, str(error.message())
        response = result.get_response()
        return response.id, result, response.parameters["triton_final_response"].bool_param, ""

    def answer(self) -> list[Any]:
        """Responses of the only request in flight."""
        results = []
        last = False
        while not last:
            _, result, last, error = self.take()
            assert not error, error
            results.append(result)
        return results


def text_of(results: list[Any]) -> str:
    parts = [result.as_numpy("text_output") for result in results]
    return "".join(part[0].decode() for part in parts if part is not None)
