"""From what a user names (an engine, a checkpoint, or `tiny`) to an engine directory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from apar.export import medusa, onnx_engine
from apar.export.checkpoint_hints import checkpoint_name, what_is_there
from apar.export.errors import EngineError
from apar.export.manifest import ABI_VERSION, FORMAT_VERSION, MANIFEST_NAME, Manifest
from apar.runtime.file_lock import file_lock

logger = logging.getLogger(__name__)

TINY = "tiny"
Progress = Callable[[str, int, int], None]


def tiny_checkpoint() -> Path:
    """The small APAR checkpoint that ships with the package."""
    return Path(onnx_engine.__file__).parent / "models" / "tiny"


def named_directory(source: str | Path) -> Path:
    """The directory that `source` names: for `tiny` the shipped checkpoint, where nothing here has that name."""
    return tiny_checkpoint() if str(source) == TINY and not Path(source).exists() else Path(source)


def cache_directory() -> Path:
    """Where engines that were built on the fly are kept: $APAR_CACHE, else the user's cache directory."""
    if own := os.environ.get("APAR_CACHE"):
        return Path(own)
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (users if users.is_absolute() else Path.home() / ".cache") / "apar"  # XDG: relative paths are ignored


def resolve_engine(source: str | Path, progress: Progress | None = None) -> Path:
    """The engine directory for `source`: an engine, a checkpoint directory, or the word `tiny`.

    A checkpoint is built once (default options) into the cache directory and found there again as
    long as its files have the same names, sizes and times; of several processes one builds and the others wait for it.
    Raises EngineError where `source` is neither or there is no cache directory, and what the build raises.
    """
    checkpoint = named_directory(source)
    if (checkpoint / MANIFEST_NAME).is_file():
        return checkpoint
    if not checkpoint.is_dir():
        raise EngineError(f"{source} is neither an engine directory nor a checkpoint directory, nor the word `tiny`")
    if not (checkpoint / "config.json").is_file():
        remedy = "give an engine built with `apar build CHECKPOINT -o DIR`, or a Hugging Face checkpoint"
        raise EngineError(
            f"{checkpoint} holds neither {MANIFEST_NAME} (an engine) nor config.json (a checkpoint); "
            f"{what_is_there(checkpoint) or remedy}"
        )
    name = checkpoint_name(checkpoint).replace("/", "-")
    target = cache_directory() / "engines" / f"{name}-{_fingerprint(checkpoint)}"
    build_once(target, lambda: onnx_engine.build(checkpoint, target, overwrite=True, progress=progress))
    return target


def build_once(target: Path, build: Callable[[], object]) -> None:
    """Make sure that the engine `target` of the cache is there: `build` it unless it is, or another process does.

    Raises EngineError where there is no cache directory, and what `build` raises.
    """
    if _is_whole(target):
        return
    lock = target.with_name(f".{target.name}.lock")
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(lock, f"{target.name} is being built by another process; waiting"))
        except OSError as error:
            raise EngineError(
                f"the cache directory {target.parent} cannot be made or written to ({error.strerror}); name another "
                "one in $APAR_CACHE, or build the engine with `apar build CHECKPOINT -o DIR`"
            ) from error
        if not _is_whole(target):
            build()


def _is_whole(engine: Path) -> bool:
    """Whether an engine of the cache is there; one that is damaged is not."""
    if not (engine / MANIFEST_NAME).is_file():
        return False
    try:
        Manifest.load(engine)
    except EngineError as error:
        logger.warning("the cached engine is damaged and is built again: %s", error)
        return False
    return True


def _fingerprint(checkpoint: Path) -> str:
    """Changes whenever a file of the checkpoint or the engine format does."""
    facts = [f"{FORMAT_VERSION}.{ABI_VERSION}", str(checkpoint.resolve())]
    for path in sorted((*checkpoint.iterdir(), *(checkpoint / medusa.FOLDER).glob("*"))):
        if path.is_file():
            stat = path.stat()
            facts.append(f"{path.relative_to(checkpoint)} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()
