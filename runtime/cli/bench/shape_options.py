"""Options of measurements that run an engine whatever its weights say: a shape, or an engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from apar.runtime.cli.parser import Parser, whole

SHAPES = ("10m", "100m", "1b", "7b")
FORMATS = ("f32", "bf16", "int8", "int4")
"""Those of apar.runtime.bench.shapes, which takes long to import."""


def add_shape_options(parser: Parser, default_format: str = "int4") -> argparse._ArgumentGroup:
    """Which engine, and how it runs; see `executor_options`."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--shape",
        default="100m",
        metavar="SHAPE|ENGINE",
        help="10m, 100m, 1b (TinyLlama) or 7b (APAR-7B) with random weights, built once into the cache directory; or "
        "an engine or checkpoint directory, or `tiny`",
    )
    _add_weights(group, default_format)
    group.add_argument("--graph", choices=("auto", "native", "portable"), default="auto", help="as for `apar generate`")
    group.add_argument("--threads", type=whole(1), metavar="N", help="threads of a step (default: physical cores)")
    group.add_argument(
        "--spinning",
        action=argparse.BooleanOptionalAction,
        help="idle threads poll for work (default: yes, except where the variable CI is set)",
    )
    group.set_defaults(num_blocks=None, kv_memory_mb=None, host_blocks=None, kv_host_memory_mb=None)
    group.set_defaults(device=None, weights=None)
    return group


def add_shape_choice(parser: Parser) -> None:
    """Which shape, for measurements that take no other engine."""
    group = parser.add_argument_group("engine")
    group.add_argument("--shape", choices=SHAPES, default="100m", help="1b is TinyLlama's, 7b is APAR-7B's")
    _add_weights(group, "int4")


def _add_weights(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument("--format", choices=FORMATS, default=default, help="weights of a shape; an engine has its own")
    group.add_argument("--layers", type=whole(1), metavar="N", help="other number of layers than the shape's")


def chosen_shape(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, for the result's settings; an engine has a format of its own, whatever `--format` says."""
    weights = options.format if options.shape in SHAPES else None
    return {"shape": options.shape, "format": weights, "layers": options.layers}


def find_shape(options: argparse.Namespace) -> Path:
    """The engine directory; it is built first where it is not there, with progress on standard error."""
    from apar.runtime.bench.shapes import shape_engine
    from apar.runtime.cli.progress import BuildProgress

    title = f"building an engine of shape {options.shape}"
    with BuildProgress(sys.stderr, title, quiet=options.quiet) as progress:
        return shape_engine(options.shape, options.format, layers=options.layers, progress=progress)
