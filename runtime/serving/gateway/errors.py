"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from apar.export.errors import AparError
from apar.runtime.serving.model_responses import TritonError

_OF_CODE = {
    "invalid_request": (400, "invalid_request_error", None),
    "context_exceeded": (400, "invalid_request_error", "context_length_exceeded"),
    "overloaded": (429, "rate_limit_error", "overloaded"),
    "engine_unavailable": (503, "server_error", "engine_unavailable"),
    "engine_failed": (500, "server_error", "engine_failed"),
    "deadline_exceeded": (504, "server_error", "deadline_exceeded"),
    "cancelled": (499, "server_error", "cancelled"),
    "internal": (500, "server_error", "internal_error"),
    "": (503, "server_error", "engine_unavailable"),
}
"""HTTP status, OpenAI's type and code for each code of the model. An error of the server's own has none: what the
gateway sends is well-formed, so something is wrong with the server, which is started again if it stays so."""


class ApiError(AparError):
    """A request cannot be served; becomes an HTTP response with OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.close = close
        """The connection cannot be used for a further request."""

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """As a whole HTTP response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        response = web.Response(
            status=self.status, text=json.dumps(self.body()), content_type="application/json", headers=headers
        )
        if self.close:
            response.force_close()
        return response


def from_triton(error: TritonError) -> ApiError:
    """The same for an error of the model or of the server."""
    status, kind, code = _OF_CODE[error.code]
    retry = 1 if status in (429, 503) else None
    return ApiError(status, str(error), kind=kind, code=code, retry_after=retry)


def draining() -> ApiError:
    """The service is shutting down."""
    return ApiError(
        503, "the service is shutting down", kind="server_error", code="shutting_down", retry_after=5, close=True
    )
