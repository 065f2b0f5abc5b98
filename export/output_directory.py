"""An output directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from types import TracebackType

from apar.export.errors import BuildError
from apar.export.manifest import MANIFEST_NAME

_QUIET_SECONDS = 60.0
"""A directory that nobody holds is left alone for so long if a process has its number: it may have just been made."""


class OutputDirectory:
    """Context manager: yields a hidden sibling directory that takes `target`'s name when the block succeeds.

    Remains of builds that were killed are removed on entering; on an exception, ours is. A build holds its directory
    by a lock, since numbers of processes mean nothing to containers that share a disk.
    """

    def __init__(self, target: Path, *, overwrite: bool, needed_bytes: int) -> None:
        """Raises nothing; all checks are made on entering. What a link points to is made or replaced, not the link."""
        self._target = Path(os.path.realpath(target))
        self._overwrite = overwrite
        self._needed = needed_bytes
        self._mark = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._partial = self._sibling("partial")
        self._held: int | None = None

    def __enter__(self) -> Path:
        """Check and make the directory. Raises BuildError: the target exists, or the disk is too small."""
        parent = self._target.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._clean(parent)
            self._check_target()
            free = shutil.disk_usage(parent).free
            if free < self._needed:
                raise BuildError(
                    f"{parent} has {free / 1e9:.2f} GB free, the engine needs {self._needed / 1e9:.2f} GB; "
                    "make room or choose another directory"
                )
            self._partial.mkdir()
            self._held = _hold(self._partial)
        except OSError as error:
            raise BuildError(f"{self._target} cannot be made: {error}") from error
        return self._partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            raise BuildError(f"{self._target} cannot be put in place: {failure}") from failure
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            if self._held is not None:
                os.close(self._held)

    def _check_target(self) -> None:
        target = self._target
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        if not (target / MANIFEST_NAME).is_file():
            raise BuildError(
                f"{target} exists and is no engine, so it is never overwritten; choose another output directory"
            )
        if not self._overwrite:
            raise BuildError(f"{target} holds an engine already; choose another output directory or pass --overwrite")

    def _publish(self) -> None:
        self._check_target()
        if not self._target.exists():
            self._partial.rename(self._target)
            sync(self._target.parent, entries=False)
            return
        old, held = self._sibling("old"), _hold(self._target)
        try:
            self._target.rename(old)
            try:
                self._partial.rename(self._target)
            except OSError:
                old.rename(self._target)
                raise
            sync(self._target.parent, entries=False)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(held)

    def _sibling(self, role: str) -> Path:
        return self._target.with_name(f".{self._target.name}.{role}-{self._mark}")

    def _clean(self, parent: Path) -> None:
        """Remove what dead builds of the same target left; put back an engine that died between two renames."""
        pattern = re.compile(re.escape(f".{self._target.name}.") + r"(partial|old)-(\d+)(?:-[0-9a-f]+)?")
        for path in parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match is None or not _is_dead(path, int(match[2])):
                continue
            if match[1] == "old" and not self._target.exists():
                path.rename(self._target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def sync(directory: Path, *, entries: bool = True) -> None:
    """Force a directory, and the files in it, to the disk."""
    for path in [*(directory.iterdir() if entries else ()), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _hold(directory: Path) -> int:
    """A handle that has a lock on the directory, wherever that is moved to, until it is closed or its process ends."""
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # without locks what is left of others is known by their numbers alone
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _is_dead(directory: Path, process: int) -> bool:
    """Whether nobody works on what `process` began."""
    try:
        age = time.time() - directory.stat().st_mtime
        handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # it has just gone
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks = True
    except BlockingIOError:
        return False
    except OSError:
        locks = False
    finally:
        os.close(handle)
    return process == os.getpid() or not _alive(process) or (locks and age > _QUIET_SECONDS)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
