"""A lock between processes that want to make the same file or directory."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def file_lock(path: Path, waiting: str) -> Iterator[None]:
    """Held by one process or thread at a time; the system frees it when its holder dies.

    The file `path` is made and stays: removing it would let two hold the lock. Where the file system has no locks, work
    goes on without.

    Args:
        path: of the lock's file; its directory must exist.
        waiting: logged when another one holds the lock.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s", waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s)", path, error.strerror)
        yield
    finally:
        os.close(handle)
