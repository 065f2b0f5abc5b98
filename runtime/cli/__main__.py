"""`python -m apar.runtime.cli`."""

import sys

from apar.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
