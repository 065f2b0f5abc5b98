#!/usr/bin/env python3
"""Build an engine directory from a checkpoint: `apar build`, for where only the source tree is at hand.

python scripts/build_engine.py /path/to/checkpoint /path/to/engine --quantize int4
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

from apar.export.errors import AparError
from apar.export.manifest import DTYPES, KV_DTYPES, QUANTIZATIONS
from apar.export.onnx_engine import BLOCK_SIZES, DEFAULT_GROUP_SIZE, build
from apar.export.quantize import GROUP_SIZES


def show(stage: str, done: int, total: int) -> None:
    """One line on a terminal, rewritten."""
    if sys.stderr.isatty():
        print(f"\r{stage}: {100 * done / max(total, 1):5.1f} %", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help=f"default {DEFAULT_GROUP_SIZE}")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    parser.add_argument("--kv-dtype", choices=("auto", *KV_DTYPES), default="auto")
    parser.add_argument("--fork-token", help="string or id of [Fork], if not [SplitMask]")
    parser.add_argument("--child-token", help="string or id of [Child], if not [SplitSop]")
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--overwrite", action="store_true")
    options = vars(parser.parse_args())
    checkpoint, output = options.pop("checkpoint"), options.pop("output")
    began = time.monotonic()
    try:
        manifest = build(checkpoint, output, **options, progress=show)
    except AparError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    size = sum(manifest.files.values()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\n{output}: {size:.2f} GB in {time.monotonic() - began:.1f} s, peak memory {peak:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
