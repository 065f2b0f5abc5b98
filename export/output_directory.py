"""An output directory that appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from apar.export.errors import BuildError
from apar.export.manifest import MANIFEST_NAME


class OutputDirectory:
    """Context manager: yields a hidden sibling directory that takes `target`'s name when the block succeeds.

    Remains of builds that were killed are removed on entering; on an exception, ours is.
    """

    def __init__(self, target: Path, *, overwrite: bool, needed_bytes: int) -> None:
        """Raises nothing; all checks are made on entering."""
        self._target = target.absolute()
        self._overwrite = overwrite
        self._needed = needed_bytes
        self._partial = self._sibling("partial")

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
        old = self._sibling("old")
        if self._target.exists():
            self._target.rename(old)
        self._partial.rename(self._target)
        sync(self._target.parent, entries=False)
        shutil.rmtree(old, ignore_errors=True)

    def _sibling(self, role: str) -> Path:
        return self._target.with_name(f".{self._target.name}.{role}-{os.getpid()}")

    def _clean(self, parent: Path) -> None:
        """Remove what dead builds of the same target left; put back an engine that died between two renames."""
        pattern = re.compile(re.escape(f".{self._target.name}.") + r"(partial|old)-(\d+)")
        for path in parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match is None or (_alive(int(match[2])) and int(match[2]) != os.getpid()):
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


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
