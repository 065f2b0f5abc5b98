"""Where NVIDIA's Triton Inference Server is on this machine, and how its program is called.

Two forms are known: an installation with its own Python (NVIDIA's containers, a build from source), and the wheel
nvidia-pytriton, which holds the whole server. `install_triton` puts the wheel into an environment of its own, because
the Python that the server starts for a model (its *stub*) needs NumPy below 2.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apar.export.errors import ServingError

VARIABLE = "APAR_TRITONSERVER"
"""Environment variable that names the server."""
CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
FOLDER = ".venv-triton"
"""Where the scripts of a checkout put the wheel's server, beside APAR's own environment."""
STUB = "triton_python_backend_stub"
LIBRARIES = "apar-libraries"
"""File in an installed environment: folder that holds the Python library of the stub, or nothing."""


@dataclass(frozen=True, slots=True)
class TritonServer:
    """An installed server."""

    binary: Path
    backends: Path | None = None
    """Folder of its backends, where the server would not look by itself."""
    python_home: Path | None = None
    """Environment of the models' Python stubs; None: whatever python3 is first on PATH."""
    libraries: tuple[Path, ...] = ()
    """Folders in which its shared libraries are looked up first."""

    def command(self, *options: str) -> list[str]:
        """The command line, with what this installation needs in front of `options`."""
        backends = [f"--backend-directory={self.backends}"] if self.backends else []
        return [str(self.binary), *backends, *options]

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """`base` (by default this process's variables) as the server needs it.

        What points Python at the caller's own packages is taken out: the stubs have another Python.
        """
        found = dict(os.environ if base is None else base)
        if self.python_home is not None:
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"):
                found.pop(name, None)
            found["PATH"] = os.pathsep.join([str(self.python_home / "bin"), found.get("PATH", os.defpath)])
        if self.libraries:
            known = found.get("LD_LIBRARY_PATH")
            found["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, self.libraries), *([known] if known else [])])
        return found


def find_server(given: str | Path | None = None) -> TritonServer:
    """The server to use: `given`, else $APAR_TRITONSERVER, else one on PATH, in /opt/tritonserver or in an environment
    made by `install_triton`.

    `given` is the program, the folder of an installation or such an environment. Raises ServingError where nothing is
    found, or where what was named is no server.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        where = "" if given else f" (from ${VARIABLE})"
        return _at(Path(named).expanduser().absolute(), where)
    for place in _usual_places():
        if place.exists():
            return _at(place, "")
    raise ServingError(
        "no tritonserver was found: not on PATH, not in /opt/tritonserver, and no environment with NVIDIA's wheel. "
        "Install the wheel's server (Linux x86_64, 250 MB) with `apar serve --install-server`, name another one with "
        f"--tritonserver PATH or ${VARIABLE}, or run in one of NVIDIA's Triton containers"
    )


def own_folder() -> Path:
    """Where `apar serve --install-server` puts the wheel's server: the cache directory, for all users of it."""
    from apar.runtime.engine_source import cache_directory

    return cache_directory() / "triton-server"


def in_environment(home: Path) -> TritonServer:
    """The wheel's server in a virtual environment. Raises ServingError where it is missing or incomplete."""
    for root in sorted(home.glob("lib/python3*/site-packages/pytriton/tritonserver")):
        binary, backends = root / "bin" / "tritonserver", root / "backends"
        if not (backends / "python" / STUB).is_file():
            raise ServingError(
                f"{home} has nvidia-pytriton, but its Python stub is not in place; "
                f"run: python -m apar.runtime.serving.install_triton {home}"
            )
        note = home / LIBRARIES
        folder = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
        return TritonServer(binary, backends, home, (Path(folder),) if folder else ())
    raise ServingError(
        f"{home} holds no nvidia-pytriton; make it with: python -m apar.runtime.serving.install_triton {home}"
    )


def _usual_places() -> Iterator[Path]:
    on_path = shutil.which("tritonserver")
    if on_path:
        yield Path(on_path)
    yield CONTAINER_BINARY
    yield Path(sys.prefix).parent / FOLDER
    yield Path(__file__).resolve().parents[2] / FOLDER
    yield own_folder()


def _at(place: Path, where: str) -> TritonServer:
    """The server at a place that a user or the look-up named."""
    if (place / "pyvenv.cfg").is_file():
        return in_environment(place)
    binary = place / "bin" / "tritonserver" if place.is_dir() else place
    if not (binary.is_file() and os.access(binary, os.X_OK)):
        raise ServingError(
            f"{place}{where} is no tritonserver: give the program, the folder of an installation (which has "
            "bin/tritonserver), or an environment made by `python -m apar.runtime.serving.install_triton FOLDER`"
        )
    for home in binary.resolve().parents:
        if (home / "pyvenv.cfg").is_file():
            return in_environment(home)
    backends = binary.parent.parent / "backends"
    return TritonServer(binary, backends if backends.is_dir() else None)
