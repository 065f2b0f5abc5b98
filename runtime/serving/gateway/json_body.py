"""A request's body to JSON, with every bound checked before anything is parsed."""

from __future__ import annotations

import asyncio
import json
from itertools import accumulate
from typing import Any, NoReturn

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from apar.runtime.serving.gateway.errors import ApiError

_STRUCTURE = b'"[]{}'
_NOT_STRUCTURE = bytes(set(range(256)) - set(_STRUCTURE))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def read_json(request: web.Request, max_bytes: int, max_depth: int, seconds: float) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises ApiError: 413 over `max_bytes`, 408 where the body takes longer than `seconds`, 400 where it is no JSON
    object in UTF-8 or nested deeper than `max_depth`.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not taken; send plain JSON", close=True)
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large", close=True)
    if request.content_length is not None and request.content_length > max_bytes:
        raise too_large
    try:
        body = await asyncio.wait_for(request.read(), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", close=True) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise ApiError(400, f"the body is not as its headers say: {error}", close=True) from None
    if depth(body, max_depth) > max_depth:
        raise ApiError(400, f"the body is nested deeper than {max_depth} levels", code="json_too_deep")
    return parse(body)


def depth(body: bytes, limit: int) -> int:
    """How deep arrays and objects of a JSON text are nested; any number above `limit` where it is more.

    Strings are skipped, without parsing: what is no JSON gets some number.
    """
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    outside = b"".join(bare.split(b'"')[::2])
    deepest = 0
    for level in accumulate(map(_STEP.__getitem__, outside)):
        if level > deepest:
            deepest = level
            if deepest > limit:
                break
    return deepest


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object from its text. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
