"""The gateway's routes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from apar.runtime.serving.gateway.admission import Admission
from apar.runtime.serving.gateway.errors import ApiError, from_triton
from apar.runtime.serving.gateway.json_body import read_json
from apar.runtime.serving.gateway.metrics import CONTENT_TYPE, GatewayMetrics
from apar.runtime.serving.gateway.replies import Reply
from apar.runtime.serving.gateway.requests import Job, chat_job, completions_job
from apar.runtime.serving.gateway.settings import GatewaySettings
from apar.runtime.serving.gateway.streams import run_job
from apar.runtime.serving.model_responses import TritonError
from apar.runtime.serving.probe import Probe
from apar.runtime.serving.triton_stream import IdleWatch

logger = logging.getLogger("apar.serving.gateway")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_request_id: ContextVar[str] = ContextVar("request_id")
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Upstream(Protocol):
    """The server behind the gateway, which may come and go: `supervisor.Supervisor`."""

    restarts: int
    probe: Probe

    @property
    def url(self) -> str | None:
        """Base URL of its HTTP interface; None while it does not answer."""

    @property
    def metrics_url(self) -> str | None:
        """URL of its metrics; None while it does not answer."""


class Gateway:
    """Serves one model. `app` is the application to run; `admission` says what is in flight."""

    def __init__(self, settings: GatewaySettings, upstream: Upstream, version: str = "") -> None:
        self.settings = settings
        self.admission = Admission(settings.max_requests)
        self.metrics = GatewayMetrics()
        self.seen: Callable[[web.Request], None] = lambda request: None
        """Told of every request that has arrived; the listener closes connections that bring none."""
        self._upstream = upstream
        self._fingerprint = f"apar-{version}" if version else "apar"
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._session: aiohttp.ClientSession | None = None
        upstream.probe.busy = lambda: self.admission.in_flight > 0
        self.app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[self._outermost])
        self.app.router.add_post("/v1/chat/completions", self._chat)
        self.app.router.add_post("/v1/completions", self._completions)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_get("/v1/models/{name:.+}", self._model)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/health/live", self._live)
        self.app.router.add_get("/metrics", self._metrics)
        self.app.on_response_prepare.append(_name_server)
        self.app.cleanup_ctx.append(self._client)

    async def _client(self, app: web.Application) -> AsyncIterator[None]:
        # A connection each: closing it is how a request is cancelled, and none stays open to delay the server's end.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            yield

    @property
    def session(self) -> aiohttp.ClientSession:
        """Client of the server behind."""
        assert self._session is not None
        return self._session

    @web.middleware
    async def _outermost(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request ids, keys, counting, and errors in OpenAI's form, for every request."""
        self.seen(request)
        given = request.headers.get("X-Request-Id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        _request_id.set(request_id)
        route = request.match_info.route.resource
        status = 500
        try:
            if request.path.startswith("/v1/"):
                self._check_key(request)
            response = await handler(request)
            status = response.status
        except ApiError as error:
            response = self._refused(error)
            status = error.status
        except web.HTTPException as error:
            response = ApiError(
                error.status, _said(error, request), code="not_found" if error.status == 404 else None
            ).response()
            status = error.status
        except (ConnectionError, aiohttp.ClientConnectionError):  # while its body was read; nobody hears the answer
            status = 499
            self.metrics.disconnects.inc()
            response = web.Response(status=status)
        except asyncio.CancelledError:
            status = 499
            self.metrics.disconnects.inc()
            raise
        except Exception:
            response = _failure(request_id).response()
        finally:
            name = route.canonical if route is not None else "other"
            self.metrics.requests.labels(name, str(status)).inc()
            logger.debug("%s %s %d, request %s", request.method, request.path[:100], status, request_id)
        if not response.prepared:
            response.headers["X-Request-Id"] = request_id
        return response

    def _refused(self, error: ApiError) -> web.Response:
        self.metrics.rejected.labels(error.code or str(error.status)).inc()
        return error.response()

    def _check_key(self, request: web.Request) -> None:
        if not self._keys:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                close=True,
            )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat_job)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, completions_job)

    async def _answer(
        self, request: web.Request, read: Callable[[dict[str, Any], GatewaySettings], Job]
    ) -> web.StreamResponse:
        settings = self.settings
        self.admission.check()
        body = await read_json(request, settings.max_body_bytes, settings.max_json_depth, settings.body_timeout)
        job = read(body, settings)
        began = time.monotonic()
        with self.admission.admit(len(job.inputs)):
            url = self._upstream.url
            if url is None:
                raise ApiError(
                    503,
                    "the engine's server is starting; try again in a moment",
                    kind="server_error",
                    code="engine_unavailable",
                    retry_after=2,
                )
            watch = IdleWatch(settings.idle_timeout)
            reply = Reply(job, _request_id.get(), settings.model_name, self._fingerprint)
            responses = run_job(self.session, url, job, watch)
            try:
                if job.common.stream:
                    return await self._stream(request, reply, responses, watch, began)
                reply.take(*await anext(responses))
                self._saw_first(began)
                async for index, response in responses:
                    self._upstream.probe.saw_tokens()
                    reply.take(index, response)
                return web.json_response(reply.whole())
            except TritonError as error:
                self._upstream.probe.saw_error(error)
                raise from_triton(error) from error
            finally:
                await responses.aclose()
                watch.close()
                self.metrics.duration.observe(time.monotonic() - began)

    async def _stream(
        self, request: web.Request, reply: Reply, responses: Any, watch: IdleWatch, began: float
    ) -> web.StreamResponse:
        """Send an answer as it comes. An error before the first token is an HTTP error, a later one an event."""
        first = await anext(responses)
        self._saw_first(began)
        answer = web.StreamResponse(headers=_STREAM_HEADERS | {"X-Request-Id": _request_id.get()})
        writing = False

        def abort() -> None:
            # A client that does not read must not keep its branches alive.
            if writing and request.transport is not None:
                request.transport.abort()

        watch.on_expiry(abort)
        try:
            await answer.prepare(request)
            await answer.write(reply.opening() + reply.chunk(*first))
            try:
                async for index, response in responses:
                    self._upstream.probe.saw_tokens()
                    written = reply.chunk(index, response)
                    if written:
                        writing = True
                        await answer.write(written)
                        writing = False
                        watch.moved()
                await answer.write(reply.closing())
            except ConnectionError:
                raise
            except Exception as error:
                # Once a stream has begun, nothing but an event can tell of an error.
                if isinstance(error, TritonError):
                    self._upstream.probe.saw_error(error)
                    said = from_triton(error)
                else:
                    said = _failure(_request_id.get())
                await answer.write(b"data: " + json.dumps(said.body()).encode() + b"\n\n")
                answer.force_close()
            await answer.write_eof()
        except (ConnectionError, aiohttp.ClientConnectionError):
            self.metrics.disconnects.inc()
            answer.force_close()
        return answer

    def _saw_first(self, began: float) -> None:
        self.metrics.first_token.observe(time.monotonic() - began)
        self._upstream.probe.saw_tokens()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != self.settings.model_name:
            raise ApiError(
                404, f"the model does not exist; this service has {self.settings.model_name!r}", code="model_not_found"
            )
        return web.json_response(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.settings.created,
            "owned_by": "apar",
            "max_model_len": self.settings.max_context,
        }

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _health(self, request: web.Request) -> web.Response:
        if self.admission.draining:
            return web.json_response({"status": "draining"}, status=503)
        health = await self._upstream.probe.check(self.session, self._upstream.url)
        said = {"status": "healthy" if health.healthy else "unhealthy", "detail": health.detail}
        return web.json_response(said, status=200 if health.healthy else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        metrics = self.metrics
        metrics.in_flight.set(self.admission.in_flight)
        metrics.draining.set(self.admission.draining)
        metrics.restarts.set(self._upstream.restarts)
        text = await metrics.text(self.session, self._upstream.metrics_url)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "apar"


def _failure(request_id: str) -> ApiError:
    """What a client hears of the exception being handled, a defect of ours; the log has the rest."""
    logger.exception("request %s failed", request_id)
    return ApiError(500, "the gateway failed; see its log", kind="server_error", code="internal_error")


def _said(error: web.HTTPException, request: web.Request) -> str:
    if error.status == 404:
        return (
            f"there is no {request.method} {request.path[:100]}; see /v1/models, /v1/chat/completions, /v1/completions"
        )
    if error.status == 405:
        return f"{request.path[:100]} does not take {request.method}"
    return error.reason
