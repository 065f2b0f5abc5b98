#!/usr/bin/env python3
"""Build an engine directory from a checkpoint; the same as `apar build`, with the same options.

python scripts/build_engine.py /path/to/checkpoint -o /path/to/engine --quantize int4
"""

import sys

from apar.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
