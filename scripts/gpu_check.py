#!/usr/bin/env python3
"""Everything about APAR that needs a GPU, in one command: correctness first, then speed against the card's limits.

    python scripts/gpu_check.py -o gpu_check.json         # about eight minutes; needs torch (CUDA), triton
    python scripts/gpu_check.py --only kernels            # sections whose names begin so
    TRITON_INTERPRET=1 python scripts/gpu_check.py --dry-run    # every section on a CPU, tiny: does it run at all

Runs from a checkout, apar need not be installed. Writes one JSON and prints tables; the exit status is 1 if a section
failed. A section that fails does not stop the others, nor does one that spoils the CUDA context (a new process goes
on); one that hangs ends the run, with everything before it in the JSON.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_apar() -> None:
    """Make `apar` importable from this checkout, whatever is installed: what is checked is what lies here."""
    home = Path(tempfile.mkdtemp(prefix="apar-check-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
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
    parser.add_argument("--resume", action="store_true", help="go on with a report: sections that it has are not run")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with Triton's interpreter")
    options = parser.parse_args()
    find_apar()
    from apar.runtime.bench.gpu.check import check

    deadline = time.perf_counter() + 60 * options.minutes
    return check(
        options.output,
        options.only,
        deadline,
        dry=options.dry_run,
        script=Path(__file__).resolve(),
        resume=options.resume,
    )


if __name__ == "__main__":
    sys.exit(main())
