"""Lets the test modules of this folder import `reference` and `fork_steps`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
