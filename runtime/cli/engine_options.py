"""Options that say which engine runs, with what; shared by `generate` and `bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apar.runtime.cli.parser import Parser, positive, whole

if TYPE_CHECKING:
    from apar.runtime.limits import SchedulerLimits

ENGINE_HELP = (
    "an engine directory (from `apar build`), a Hugging Face checkpoint directory (built once into the cache "
    "directory: $APAR_CACHE, else the user's cache), or `tiny`, the small model that ships with apar"
)
EXECUTOR_NAMES = ("auto", "onnx", "torch", "tensorrt")
DEFAULT_ROWS = 256
DEFAULT_STEP_TOKENS = 1024


def add_engine_options(parser: Parser, required: bool = True) -> None:
    """ENGINE and how to run it."""
    parser.add_argument("engine", metavar="ENGINE", nargs=None if required else "?", help=ENGINE_HELP)
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--executor",
        type=_executor,
        default="auto",
        metavar="{" + ",".join(EXECUTOR_NAMES) + "}",
        help="what runs the model; auto is tensorrt for its engines, torch where there is a GPU that can run the "
        "model, else onnx. package.module:Class is one of your own",
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: a GPU where one can run the model, else the CPU)",
    )
    group.add_argument(
        "--weights",
        choices=("bf16", "fp16", "int8", "fp8"),
        help="weights on a GPU; int8 and fp8 have a scale for each output (default: 16 bits, as the engine has them)",
    )
    group.add_argument(
        "--graph",
        choices=("auto", "native", "portable"),
        default="auto",
        help="onnx only: the graph with apar's own attention kernels (native), or with standard operators "
        "(portable, slower); auto takes native where its library is there",
    )
    group.add_argument(
        "--threads", type=whole(1), metavar="N", help="onnx only: threads of a step (default: physical cores)"
    )
    group.add_argument(
        "--spinning",
        action=argparse.BooleanOptionalAction,
        help="onnx only: idle threads poll for work; faster on a machine of one's own, much slower on a busy one "
        "(default: yes, except where the variable CI is set)",
    )
    pool = group.add_mutually_exclusive_group()
    pool.add_argument(
        "--num-blocks",
        type=whole(1),
        metavar="N",
        help="blocks in the KV pool (default: eight full contexts, at most a quarter of the free memory)",
    )
    pool.add_argument("--kv-memory-mb", type=whole(1), metavar="MB", help="the same by its size in MiB")
    host = group.add_mutually_exclusive_group()
    host.add_argument(
        "--host-blocks",
        type=whole(0),
        metavar="N",
        help="torch only: blocks in host memory that keep what the KV pool has no room for, preempted answers among "
        "it; it comes back by a copy instead of being computed again (default: 0)",
    )
    host.add_argument("--kv-host-memory-mb", type=whole(0), metavar="MB", help="the same by its size in MiB")
    group.add_argument(
        "--max-rows", type=whole(1), default=DEFAULT_ROWS, metavar="N", help="branches in one step, over all prompts"
    )
    group.add_argument(
        "--max-step-tokens",
        type=whole(2),
        metavar="N",
        help=f"tokens in one step; prompts are read in such chunks (default: {DEFAULT_STEP_TOKENS}, or twice "
        "--max-rows where that is more)",
    )
    add_policy_options(group)


def add_policy_options(group: argparse._ArgumentGroup) -> None:
    """Fork policy and service level."""
    group.add_argument(
        "--fork-policy",
        choices=("always", "never", "adaptive"),
        default="always",
        help="who may fork: everybody, nobody, or as far as the service level of all allows (default: always)",
    )
    add_service_level_options(group)


def add_service_level_options(group: argparse._ArgumentGroup) -> None:
    """What is in time."""
    group.add_argument(
        "--slo-first-token",
        type=positive,
        default=0.5,
        metavar="SECONDS",
        help="service level: from arrival to the first token (default: 0.5)",
    )
    group.add_argument(
        "--slo-latency",
        type=positive,
        default=2.5,
        metavar="FACTOR",
        help="service level: from arrival to the end, as a multiple of what the request takes alone and without forks "
        "(default: 2.5)",
    )


def _executor(name: str) -> str:
    """An argparse type: the name of an executor."""
    module, colon, attribute = name.partition(":")
    if name not in EXECUTOR_NAMES and not (colon and module and attribute):
        raise argparse.ArgumentTypeError(
            f"there is no executor {name!r} (choose from {', '.join(EXECUTOR_NAMES)}, or write package.module:Class)"
        )
    return name


def executor_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the executor; only what the user gave."""
    found: dict[str, Any] = {}
    if options.device is not None:
        found["device"] = options.device
    if options.weights is not None:
        found["weights"] = options.weights
    if options.graph != "auto":
        found["graph"] = options.graph
    if options.threads is not None:
        found["threads"] = options.threads
    if options.spinning is not None:
        found["spinning"] = options.spinning
    if options.num_blocks is not None:
        found["num_blocks"] = options.num_blocks
    if options.kv_memory_mb is not None:
        found["kv_memory_bytes"] = options.kv_memory_mb << 20
    if options.host_blocks is not None:
        found["host_blocks"] = options.host_blocks
    if options.kv_host_memory_mb is not None:
        found["kv_host_memory_bytes"] = options.kv_host_memory_mb << 20
    return found


def engine_arguments(options: argparse.Namespace) -> list[str]:
    """The same options as a command line, for another `apar` command; ENGINE is not among them."""
    names = [
        "executor",
        "device",
        "weights",
        "graph",
        "threads",
        "num_blocks",
        "kv_memory_mb",
        "host_blocks",
        "kv_host_memory_mb",
        "max_rows",
        "max_step_tokens",
    ]
    names += ["fork_policy", "slo_first_token", "slo_latency"]
    given = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in names]
    arguments = [str(part) for pair in given if pair[1] is not None for part in pair]
    if options.spinning is not None:
        arguments.append("--spinning" if options.spinning else "--no-spinning")
    return arguments


def scheduler_limits(options: argparse.Namespace, *, prefix_caching: bool = True) -> SchedulerLimits:
    """Sizes of the scheduler. Raises CapacityError where they do not fit together."""
    from apar.runtime.limits import SchedulerLimits
    from apar.runtime.service_level import ServiceLevel

    rows = options.max_rows
    tokens = options.max_step_tokens
    return SchedulerLimits(
        max_rows=rows,
        max_step_tokens=max(DEFAULT_STEP_TOKENS, 2 * rows) if tokens is None else tokens,
        max_live_branches=max(1024, 4 * rows),
        prefix_caching=prefix_caching,
        fork_policy=options.fork_policy,
        service_level=ServiceLevel(options.slo_first_token, options.slo_latency),
    )


def find_engine(source: str, quiet: bool = False) -> Path:
    """The engine directory for ENGINE; a checkpoint is built into the cache first, with progress on stderr."""
    from apar.runtime.cli.progress import BuildProgress
    from apar.runtime.engine_source import resolve_engine

    progress = BuildProgress(sys.stderr, f"building an engine from {source}", quiet=quiet)
    with progress:
        return resolve_engine(source, progress)
