"""Start a program that the system ends when its parent dies: `python launch.py PARENT SIGNAL PROGRAM [ARGUMENT ...]`.

By prctl(PR_SET_PDEATHSIG), which survives exec. A program of its own rather than a `preexec_fn`, because Python code
between fork and exec of a process with threads may hang. Standard library only.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program."""
    parent, signal_number = int(sys.argv[1]), int(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0):
        sys.exit(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the call above
        sys.exit("the parent process is gone")
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
