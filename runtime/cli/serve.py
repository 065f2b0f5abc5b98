"""`apar serve`: an engine as a service, with OpenAI's API in front and NVIDIA's Triton server behind it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apar.export.errors import RequestError, ServingError
from apar.runtime.cli.draft_options import add_draft_options, draft_options
from apar.runtime.cli.engine_options import add_engine_options, executor_options, find_engine, scheduler_limits
from apar.runtime.cli.parser import Parser, positive, whole

if TYPE_CHECKING:
    from apar.runtime.serving.full_service import Urls
    from apar.runtime.serving.gateway.settings import GatewaySettings
    from apar.runtime.serving.triton_process import TritonSettings
    from apar.runtime.serving.triton_server import TritonServer

API_KEY_VARIABLE = "APAR_API_KEY"
DESCRIPTION = """\
Serve an engine: OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models), /health and /metrics at --host and
--port, in front of NVIDIA's Triton Inference Server with APAR's model repository. The server is found on PATH, in
/opt/tritonserver or in an environment with NVIDIA's wheel; it listens on this machine's loopback interface only, unless
--triton-address asks for more. What dies is started again; SIGTERM lets answers in flight end first.
"""
EPILOG = """\
examples:
  apar serve tiny --install-server                   # the model that ships with apar; gets NVIDIA's server if need be
  apar serve ./engine --host 0.0.0.0 --api-key-file keys.txt
  apar serve ./engine --triton-address 127.0.0.1     # Triton's own gRPC and HTTP on ports 8001 and 8003

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tiny", "messages": [{"role": "user", "content": "Four facts about owls?"}], "stream": true}'

docs/serving.md has every field, the operation of a service, and what is known of each server version's risks.
"""
RISKS = """\
apar: note: Triton's own ports are open at {address}. Clients there pass by the API key and every limit of the
apar: note: gateway, and can crash server 2.51: by deeply nested JSON, many cancelled gRPC calls, one metadata header.
apar: note: Let trusted clients only reach these ports (docs/serving.md, "Risks of Triton's own ports").
"""
DEFAULT_PORT = 8000
TRITON_PORTS = {"grpc": 8001, "metrics": 8002, "http": 8003}
"""With --triton-address; without it any free ports are taken."""
ENGINE_MARGIN = 16
"""Requests that the engine takes beyond the gateway's limit: health checks and clients of Triton's own ports."""


def make_parser() -> Parser:
    """Options of `apar serve`."""
    parser = Parser(prog="apar serve", usage="apar serve ENGINE [options]", description=DESCRIPTION, epilog=EPILOG)
    add_engine_options(parser)
    group = parser.add_argument_group("the API")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDR", help="address to listen at")
    group.add_argument("--port", type=whole(0, 65535), default=DEFAULT_PORT, metavar="N", help="port; 0: a free one")
    group.add_argument(
        "--model-name", metavar="NAME", help="the model's name in requests (default: ENGINE's last part)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that clients must send; may be repeated (default: ${API_KEY_VARIABLE}, else none). Other "
        "users of this machine see a command's options: prefer the variable or a file",
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-requests", type=whole(1), default=256, metavar="N", help="answers in flight; more get status 429"
    )
    group.add_argument("--max-body-mb", type=positive, default=4.0, metavar="MB", help="largest body of a request")
    group.add_argument(
        "--deadline", type=positive, default=600.0, metavar="S", help="seconds that an answer may take in all"
    )
    group.add_argument(
        "--idle-timeout",
        type=positive,
        default=60.0,
        metavar="S",
        help="seconds between two tokens, or without reading",
    )
    group.add_argument(
        "--drain-seconds", type=positive, default=30.0, metavar="S", help="what answers in flight get after SIGTERM"
    )
    add_draft_options(parser)
    group = parser.add_argument_group("the Triton server")
    group.add_argument("--tritonserver", metavar="PATH", help="the program, or the folder of an installation")
    group.add_argument(
        "--install-server",
        action="store_true",
        help="where no server is found, install NVIDIA's wheel (Linux x86_64, 250 MB) into apar's cache directory",
    )
    group.add_argument(
        "--triton-address",
        metavar="ADDR",
        help="open Triton's own gRPC and HTTP at this address, for tritonclient; see the risks in docs/serving.md",
    )
    for name, port in TRITON_PORTS.items():
        group.add_argument(
            f"--triton-{name}-port",
            type=whole(0, 65535),
            metavar="N",
            help=f"(default: {port} with --triton-address, else a free one)",
        )
    group.add_argument(
        "--startup-timeout", type=positive, default=600.0, metavar="S", help="seconds until the server must answer"
    )
    parser.add_argument(
        "--urls", type=Path, metavar="FILE", help="write the URLs to FILE (JSON) once requests are answered"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print no URLs and no progress")
    parser.add_debug()
    return parser


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns 0 after an orderly end."""
    parser: Parser = options.parser
    try:
        limits = scheduler_limits(options)
        draft_options(options)
    except RequestError as error:
        parser.error(str(error))
    if options.urls is not None and not options.urls.parent.is_dir():
        parser.error(f"argument --urls: there is no directory {options.urls.parent} to write {options.urls.name} to")
    keys = _api_keys(options)
    require_packages()

    import asyncio
    import logging

    from apar.runtime.cli import version
    from apar.runtime.serving.full_service import FullService
    from apar.runtime.serving.gateway.listener import bind

    if not options.debug:
        logging.getLogger("apar").setLevel(logging.INFO)
    listener = bind(options.host, options.port)
    server = server_for(options)
    directory = find_engine(options.engine, quiet=options.quiet)
    parameters = _parameters(options, directory.resolve(), limits)
    gateway = _gateway_settings(options, directory, keys)
    triton = _triton_settings(options, server)
    if options.triton_address and not options.quiet:
        print(RISKS.format(address=options.triton_address), end="", file=sys.stderr)

    async def serve() -> None:
        service = FullService(
            gateway,
            triton,
            listener,
            lambda folder: _fill(folder, parameters, everything=options.triton_address is not None),
            options.drain_seconds,
            version(),
        )
        await service.run(lambda urls: _announce(options, gateway, urls))

    if not options.quiet:
        print("apar: starting the Triton server ...", file=sys.stderr)
    asyncio.run(serve())
    return 0


def require_packages() -> None:
    """Raise ServingError where the extra `serve` is not installed."""
    try:
        import aiohttp  # noqa: F401
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        raise ServingError(
            f"serving needs the package {error.name}; install apar with its extra: pip install 'apar[serve]'"
        ) from None


def _api_keys(options: argparse.Namespace) -> tuple[str, ...]:
    keys = list(options.api_key)
    if options.api_key_file is not None:
        try:
            lines = options.api_key_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"cannot read the keys of {options.api_key_file}: {error}") from error
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise ServingError(f"{options.api_key_file} holds no key; write one a line")
    if not keys and os.environ.get(API_KEY_VARIABLE):
        keys = [os.environ[API_KEY_VARIABLE]]
    os.environ.pop(API_KEY_VARIABLE, None)  # the server's processes need not know it
    if "" in keys:
        options.parser.error("an API key is empty")
    return tuple(keys)


def server_for(options: argparse.Namespace) -> TritonServer:
    """The server that the options name or allow to install. Raises ServingError."""
    from apar.runtime.serving.triton_server import find_server, own_folder

    try:
        return find_server(options.tritonserver)
    except ServingError:
        if not options.install_server or options.tritonserver:
            raise
    from apar.runtime.serving.install_triton import install

    return install(own_folder(), lambda text: print(f"apar: {text}", file=sys.stderr))


def _parameters(options: argparse.Namespace, directory: Path, limits: Any) -> dict[str, str]:
    """Parameters of the model repository."""
    parameters = {
        "engine": str(directory),
        "executor": options.executor,
        "max_rows": str(limits.max_rows),
        "max_step_tokens": str(limits.max_step_tokens),
        "max_live_branches": str(limits.max_live_branches),
        "fork_policy": limits.fork_policy,
        "slo_first_token": str(limits.service_level.first_token_seconds),
        "slo_latency": str(limits.service_level.latency_factor),
        "max_requests": str(options.max_requests + ENGINE_MARGIN),
    }
    if options.draft != "none":
        chosen = draft_options(options)
        given = {item.name: getattr(chosen, item.name) for item in dataclasses.fields(chosen) if item.name != "method"}
        parameters["draft"] = chosen.method
        parameters["draft_options"] = json.dumps({name: value for name, value in given.items() if value is not None})
    found = executor_options(options)
    blocks, memory = found.pop("num_blocks", None), found.pop("kv_memory_bytes", None)
    host_blocks, host_memory = found.pop("host_blocks", None), found.pop("kv_host_memory_bytes", None)
    parameters |= {name: found.pop(name) for name in ("device", "weights") if name in found}
    if blocks is not None:
        parameters["num_blocks"] = str(blocks)
    if memory is not None:
        parameters["kv_memory_mb"] = str(options.kv_memory_mb)
    if host_blocks is not None:
        parameters["host_blocks"] = str(host_blocks)
    if host_memory is not None:
        parameters["kv_host_memory_mb"] = str(options.kv_host_memory_mb)
    if found:
        parameters["executor_options"] = json.dumps(found)
    return parameters


def default_model_name(engine: str) -> str:
    """The last part of ENGINE. A link's own name counts: clients must not see what `current` points to today."""
    return Path(os.path.abspath(engine)).name


def _gateway_settings(options: argparse.Namespace, directory: Path, keys: tuple[str, ...]) -> GatewaySettings:
    from apar.export.manifest import MANIFEST_NAME, Manifest
    from apar.runtime.serving.file_limit import allow_connections
    from apar.runtime.serving.gateway.settings import MAX_CONNECTIONS, GatewaySettings

    return GatewaySettings(
        model_name=options.model_name or default_model_name(options.engine),
        max_context=Manifest.load(directory).decoder.max_context,
        created=int((directory / MANIFEST_NAME).stat().st_mtime),
        api_keys=keys,
        max_requests=options.max_requests,
        max_connections=allow_connections(MAX_CONNECTIONS, options.max_requests),
        max_body_bytes=int(options.max_body_mb * (1 << 20)),
        deadline=options.deadline,
        idle_timeout=options.idle_timeout,
    )


def _triton_settings(options: argparse.Namespace, server: TritonServer) -> TritonSettings:
    from apar.runtime.serving.triton_process import LOOPBACK, TritonSettings

    ports = {name: getattr(options, f"triton_{name}_port") for name in TRITON_PORTS}
    usual = TRITON_PORTS if options.triton_address else dict.fromkeys(TRITON_PORTS, 0)
    ports = {name: usual[name] if port is None else port for name, port in ports.items()}
    return TritonSettings(
        server,
        repository=Path(),
        address=options.triton_address or LOOPBACK,
        http_port=ports["http"],
        grpc_port=ports["grpc"] if options.triton_address else None,
        metrics_port=ports["metrics"],
        startup_timeout=options.startup_timeout,
    )


def _fill(folder: Path, parameters: dict[str, str], everything: bool) -> None:
    """Write the model repository; only the model that the gateway calls, unless others may call too."""
    from apar.runtime.serving.repository import MODELS, write_repository

    python = sys.executable
    if os.environ.get("PYTHONPATH"):
        # The server's own Python must not see it; the engine's may need it.
        wrapper = folder.with_name("engine-python")
        path = os.environ["PYTHONPATH"].replace("'", "'\\''")
        wrapper.write_text(f"#!/bin/sh\nPYTHONPATH='{path}' exec '{sys.executable}' \"$@\"\n", encoding="utf-8")
        wrapper.chmod(0o700)
        python = str(wrapper)
    write_repository(folder, {**parameters, "engine_python": python}, MODELS if everything else ("apar",))


def _announce(options: argparse.Namespace, gateway: GatewaySettings, urls: Urls) -> None:
    """Say where the service listens."""
    triton = urls.triton
    known = {"openai": f"{urls.gateway}/v1", "health": f"{urls.gateway}/health", "metrics": f"{urls.gateway}/metrics"}
    if triton.grpc:
        known |= {"triton_grpc": triton.grpc, "triton_http": triton.http, "triton_metrics": triton.metrics_url}
    if options.urls is not None:
        said = {"model": gateway.model_name, "pid": os.getpid(), **known}
        made = options.urls.with_name(options.urls.name + ".part")
        made.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        made.replace(options.urls)
    if options.quiet:
        return
    print(f"apar: the model {gateway.model_name!r} is served; Ctrl-C ends it", file=sys.stderr)
    for name, url in known.items():
        print(f"{name.replace('_', ' '):15} {url}", flush=True)
    if not gateway.api_keys and options.host not in ("127.0.0.1", "::1", "localhost"):
        print("apar: note: there is no API key: whoever reaches this address may use it", file=sys.stderr)
