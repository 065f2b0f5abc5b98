#!/usr/bin/env python3
"""Everything about APAR that needs a GPU, in one command: correctness first, then speed against the card's limits.

    python scripts/gpu_check.py -o gpu_check.json         # about eight minutes; needs torch (CUDA), triton, onnx
    python scripts/gpu_check.py --only kernels            # sections whose names begin so
    TRITON_INTERPRET=1 python scripts/gpu_check.py --dry-run    # every section on a CPU, tiny: does it run at all

Runs from a checkout, apar need not be installed. Writes one JSON and prints tables; the exit status is 1 if a
correctness section failed. A section that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_apar() -> None:
    """Make `apar` importable: as it is installed, else from this checkout."""
    try:
        import apar.plugins  # noqa: F401
    except ModuleNotFoundError:
        home = Path(tempfile.mkdtemp(prefix="apar-check-"))
        (home / "apar").mkdir()
        for name in ("export", "runtime", "plugins"):
            (home / "apar" / name).symlink_to(ROOT / name)
        sys.path.insert(0, str(home))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_check.json"), help="the JSON to write")
    parser.add_argument("--only", default="", metavar="NAME", help="only sections whose names begin so")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section begins that would not fit")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with Triton's interpreter")
    options = parser.parse_args()
    find_apar()
    from apar.runtime.bench.gpu.check import check

    deadline = time.perf_counter() + 60 * options.minutes
    return check(options.output, options.only, deadline, dry=options.dry_run, script=Path(__file__).resolve())


if __name__ == "__main__":
    sys.exit(main())
