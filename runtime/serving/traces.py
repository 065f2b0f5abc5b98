"""What a running service leaves on the machine, and how all of it goes away.

Every process of a service (server, stubs, engine) has the variable APAR_SERVE_ID in its environment, its shared memory
has a prefix, its files lie in one folder. Run as a program, this file is the service's *watchdog*: it waits until its
standard input ends, which the system closes even for a supervisor that was killed, and then removes what is left:

    python traces.py IDENTITY SHARED_MEMORY_PREFIX FOLDER

It imports nothing but the standard library, so that it starts in no time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

VARIABLE = "APAR_SERVE_ID"
SHARED_MEMORY = Path("/dev/shm")
KILL_SECONDS = 10.0


def parent_of(pid: int) -> int | None:
    """Process id of a live process's parent; None where it has ended or cannot be seen."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def processes_of(identity: str) -> list[int]:
    """Ids of live processes of this user that carry this identity, the caller excepted. Linux only."""
    wanted = f"{VARIABLE}={identity}".encode()
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables and parent_of(int(entry.name)) is not None:
            found.append(int(entry.name))
    return found


def kill_all(identity: str) -> list[int]:
    """Kill every process with this identity, and wait until they are gone; returns those that would not go."""
    end = time.monotonic() + KILL_SECONDS
    while True:
        left = processes_of(identity)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def remove_shared_memory(prefix: str) -> None:
    """Delete the shared-memory files whose names begin with `prefix`, which must not be empty."""
    if prefix and SHARED_MEMORY.is_dir():
        for file in SHARED_MEMORY.iterdir():
            if file.name.startswith(prefix):
                with contextlib.suppress(OSError):
                    file.unlink()


def main() -> None:
    """Wait for the end of standard input, then remove all. A line that says `done` means: nothing is left to do."""
    identity, prefix, folder = sys.argv[1:4]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = sys.stdin.read()
    if said.strip() != "done":
        kill_all(identity)
        remove_shared_memory(prefix)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
