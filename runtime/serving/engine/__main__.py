"""`python -m apar.runtime.serving.engine DIRECTORY`."""

import sys

from apar.runtime.serving.engine.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
