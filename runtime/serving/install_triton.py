"""Install NVIDIA's Triton Inference Server from its wheel: `python -m apar.runtime.serving.install_triton FOLDER`.

The wheel nvidia-pytriton holds the server with its Python backend. It goes into a virtual environment of its own with
NumPy below 2. Its stubs are linked to a Python library (libpython3.N.so) that many Pythons do not bring along: one is
chosen for which the library is there or, as root on Debian and its kin, can be installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apar.export.errors import ServingError
from apar.runtime.serving.triton_server import LIBRARIES, STUB, TritonServer, in_environment

WHEEL = "nvidia-pytriton==0.7.0"
NUMPY = "numpy<2"
MINORS = (11, 12, 10, 9)
"""Python 3 versions for which the wheel has a stub and NumPy below 2 has wheels, preferred first."""
MARK = "apar-triton"
"""File in a finished environment: what was installed."""
CONTAINER_HINT = "use one of NVIDIA's Triton containers, or name another server with --tritonserver"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Python:
    """An interpreter whose version has a stub."""

    path: str
    minor: int
    library_folder: str
    """Where this interpreter's own build keeps its library."""

    @property
    def library(self) -> str:
        """File name of the Python library that the stub asks for."""
        return f"libpython3.{self.minor}.so.1.0"


def install(folder: Path, say: Say = print) -> TritonServer:
    """Make sure that `folder` is an environment with the server; quick if it is one already.

    Downloads about 100 MB with pip. Raises ServingError, with the remedy, where the server cannot run here.
    """
    folder = folder.expanduser().absolute()
    if _finished(folder):
        return in_environment(folder)
    _check_platform()
    python = _choose_python(say)
    say(f"installing NVIDIA's Triton server ({WHEEL}) for Python 3.{python.minor} into {folder}")
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        raise ServingError(f"{folder} exists and is no virtual environment; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole: an interrupted run leaves nothing that looks finished.
    made = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        _make(made, python)
        _check_stub(made, python)
        (made / MARK).write_text(_mark(), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return in_environment(folder)


def main() -> int:
    """Command line; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if sys.argv[1:] == ["--help"] else 2
    try:
        install(Path(sys.argv[1]), lambda text: print(f"-- {text}", flush=True))
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _mark() -> str:
    return f"{WHEEL} {NUMPY}\n"


def _finished(folder: Path) -> bool:
    mark = folder / MARK
    # An environment whose interpreter was removed has a dangling link here.
    return mark.is_file() and mark.read_text(encoding="utf-8") == _mark() and (folder / "bin" / "python3").exists()


def _check_platform() -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise ServingError(
            f"NVIDIA's wheel with the Triton server is for Linux x86_64, not {system} {machine}; {CONTAINER_HINT}"
        )
    libc, version = platform.libc_ver()
    if libc == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < (2, 35):
        raise ServingError(
            f"NVIDIA's Triton server needs glibc 2.35 or newer, this system has {version}; {CONTAINER_HINT}"
        )


def _choose_python(say: Say) -> _Python:
    """An interpreter with its library, which is installed if need be and possible."""
    found = list(_interpreters())
    for python in found:
        if _has_library(python):
            return python
    if found and _can_apt():
        for python in found:
            package = f"libpython3.{python.minor}"
            say(f"installing {package} with apt-get: the server's Python stub is linked to it")
            if _apt_install(package) and _has_library(python):
                return python
    versions = ", ".join(f"3.{minor}" for minor in sorted(MINORS))
    if not found:
        raise ServingError(f"NVIDIA's Triton server needs a Python {versions} for its models; install one of them")
    names = " or ".join(python.library for python in found)
    raise ServingError(
        f"NVIDIA's Triton server needs the shared library {names}, which is not installed. On Debian and Ubuntu: "
        f"apt-get install libpython3.{found[0].minor} (as root)"
    )


def _interpreters() -> Iterator[_Python]:
    """Usable interpreters on this machine: that of this process first, each version once."""
    names = [
        getattr(sys, "_base_executable", sys.executable),
        *(f"python3.{minor}" for minor in MINORS),
        "/usr/bin/python3",
    ]
    program = "import sys, sysconfig, venv; print(*sys.version_info[:2], sysconfig.get_config_var('LIBDIR') or '')"
    seen = set()
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        asked = subprocess.run([path, "-I", "-c", program], capture_output=True, text=True, check=False)
        major, _, rest = asked.stdout.strip().partition(" ")
        minor, _, folder = rest.partition(" ")
        if asked.returncode or major != "3" or int(minor) not in MINORS or minor in seen:
            continue
        seen.add(minor)
        yield _Python(path, int(minor), folder)


def _has_library(python: _Python) -> bool:
    """Whether the loader finds the library by itself, or it lies with its interpreter."""
    return _is_loadable(python.library) or (Path(python.library_folder) / python.library).is_file()


def _is_loadable(library: str) -> bool:
    # In a process of its own: two Python libraries in one are asking for trouble.
    program = f"import ctypes; ctypes.CDLL({library!r})"
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, check=False).returncode == 0


def _can_apt() -> bool:
    return hasattr(os, "getuid") and os.getuid() == 0 and shutil.which("apt-get") is not None


def _apt_install(package: str) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", package]):
        command = ["apt-get", "-q", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode == 0


def _make(home: Path, python: _Python) -> None:
    """An environment with the wheel, NumPy, and the stub beside its backend."""
    _run([python.path, "-m", "venv", "--without-pip", str(home)], "cannot make a virtual environment")
    packages = home / "lib" / f"python3.{python.minor}" / "site-packages"
    # pip of this environment, installing for another Python: works with every pip and needs none over there.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", "--no-deps"]
    pip += ["--no-compile", "--only-binary=:all:", f"--python-version=3.{python.minor}", f"--target={packages}"]
    _run([*pip, WHEEL, NUMPY], "pip could not install the server")
    server = packages / "pytriton" / "tritonserver"
    shutil.copy2(server / "python_backend_stubs" / f"3.{python.minor}" / STUB, server / "backends" / "python" / STUB)
    for program in (server / "bin" / "tritonserver", server / "backends" / "python" / STUB):
        program.chmod(0o755)
    own = "" if _is_loadable(python.library) else python.library_folder
    (home / LIBRARIES).write_text(own, encoding="utf-8")


def _check_stub(home: Path, python: _Python) -> None:
    """A stub that misses a library would make the server wait for it for ever."""
    server = in_environment(home)
    assert server.backends is not None
    environment = server.environment() | {"LD_TRACE_LOADED_OBJECTS": "1"}
    for program in (server.binary, server.backends / "python" / STUB):
        listed = subprocess.run([program], env=environment, capture_output=True, text=True, check=False).stdout
        missing = [line.split()[0] for line in listed.splitlines() if "not found" in line]
        if missing:
            raise ServingError(
                f"{program.name} of {WHEEL} misses {', '.join(missing)} on this system; {CONTAINER_HINT}"
            )


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ServingError(f"{failure}: {said[-1] if said else f'exit code {done.returncode}'}")


if __name__ == "__main__":
    sys.exit(main())
