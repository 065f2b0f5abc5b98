"""From a name to an engine: the cache under several processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apar.export import onnx_engine
from apar.runtime.engine_source import cache_directory, named_directory, resolve_engine, tiny_checkpoint
from apar.runtime.file_lock import file_lock

RESOLVE = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from apar.runtime.engine_source import resolve_engine
from apar.export.manifest import Manifest
engine = resolve_engine("tiny")
Manifest.load(engine).verify(engine)
print("engine", engine, engine.stat().st_ino, flush=True)
"""


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_directory("tiny") == named_directory(Path("tiny")) == tiny_checkpoint()
    assert named_directory("other") == Path("other")
    (tmp_path / "tiny").mkdir()  # what lies here goes first
    assert named_directory("tiny") == Path("tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def start() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-u", "-c", RESOLVE], stdout=subprocess.PIPE, text=True)


def lock_of(engine: Path) -> Path:
    return engine.with_name(f".{engine.name}.lock")


def test_one_process_builds_and_the_others_wait(cache: Path) -> None:
    engine = resolve_engine("tiny")
    for path in engine.iterdir():
        path.unlink()
    engine.rmdir()
    with file_lock(lock_of(engine), "never"):  # so that all come before the first begins
        processes = [start() for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            assert "is being built by another process; waiting" in process.stdout.readline()
        assert not engine.exists()
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {text.splitlines()[-1] for text in said} == {f"engine {engine} {engine.stat().st_ino}"}
    assert {path.name for path in cache.iterdir()} == {engine.name, lock_of(engine).name}


def test_a_builder_that_is_killed_holds_nobody_up(cache: Path) -> None:
    engine = resolve_engine("tiny")
    for path in engine.iterdir():
        path.unlink()
    engine.rmdir()
    hold = "import sys; from pathlib import Path; from apar.runtime.file_lock import file_lock\n"
    hold += "with file_lock(Path(sys.argv[1]), ''): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, lock_of(engine)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    waiter = start()
    assert waiter.stdout is not None
    assert "waiting" in waiter.stdout.readline()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert waiter.communicate(timeout=120)[0].startswith("engine ")
    assert (engine / "manifest.json").is_file()


def test_threads_of_one_process_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []
    together = threading.Barrier(4)
    build = onnx_engine.build

    def counting(checkpoint: Path, target: Path, **options: object) -> object:
        builds.append(target)
        return build(checkpoint, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_engine, "build", counting)
    found: list[Path] = []

    def resolve() -> None:
        together.wait()
        found.append(resolve_engine("tiny"))

    threads = [threading.Thread(target=resolve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 4 and len(set(found)) == 1
    assert builds == [found[0]]


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("APAR_CACHE", "relative")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == Path("relative")
    monkeypatch.setenv("APAR_CACHE", "")
    assert cache_directory() == tmp_path / "xdg" / "apar"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_directory() == tmp_path / ".cache" / "apar"
