"""The look-up of a Triton server, and the installation of the wheel's."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from apar.export.errors import ServingError
from apar.runtime.serving import install_triton, triton_server
from apar.runtime.serving.install_triton import install
from apar.runtime.serving.triton_server import STUB, VARIABLE, TritonServer, find_server, in_environment


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server in the usual places."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_server, "CONTAINER_BINARY", tmp_path / "opt" / "bin" / "tritonserver")
    monkeypatch.setattr(triton_server, "FOLDER", ".no-such-environment")


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def environment(home: Path, stub: bool = True) -> Path:
    """What the installer leaves, as far as the look-up is concerned."""
    server = home / "lib" / "python3.11" / "site-packages" / "pytriton" / "tritonserver"
    binary = program(server / "bin" / "tritonserver")
    (home / "pyvenv.cfg").write_text("")
    if stub:
        program(server / "backends" / "python" / STUB)
    return binary


class TestLookUp:
    def test_nothing_there_says_what_to_do(self) -> None:
        with pytest.raises(ServingError, match=r"--install-server.*--tritonserver PATH.*container"):
            find_server()

    def test_order(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        environment(triton_server.own_folder())
        assert find_server().python_home == triton_server.own_folder()
        program(triton_server.CONTAINER_BINARY)
        assert find_server() == TritonServer(triton_server.CONTAINER_BINARY)
        on_path = program(tmp_path / "empty" / "tritonserver")
        assert find_server().binary == on_path
        named = program(tmp_path / "named" / "bin" / "tritonserver")
        (tmp_path / "named" / "backends").mkdir()
        monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
        assert find_server() == TritonServer(named, tmp_path / "named" / "backends")
        assert find_server(on_path).binary == on_path

    def test_checkouts_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(triton_server, "FOLDER", ".venv-triton")
        monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv-demo"))
        binary = environment(tmp_path / ".venv-triton")
        assert find_server() == TritonServer(binary, binary.parents[1] / "backends", tmp_path / ".venv-triton")

    @pytest.mark.parametrize("name", ["missing", "folder", "file"])
    def test_named_thing_is_no_server(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("")
        with pytest.raises(ServingError, match=rf"{name} is no tritonserver"):
            find_server(tmp_path / name)
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))
        with pytest.raises(ServingError, match=rf"{name} \(from \$APAR_TRITONSERVER\) is no tritonserver"):
            find_server()

    def test_program_inside_an_environment_is_that_environment(self, tmp_path: Path) -> None:
        binary = environment(tmp_path / "home")
        assert find_server(binary) == find_server(tmp_path / "home")

    def test_wheel_without_its_stub_in_place(self, tmp_path: Path) -> None:
        environment(tmp_path, stub=False)
        with pytest.raises(ServingError, match="stub is not in place; run: python -m"):
            find_server(tmp_path)

    def test_variables_of_the_caller_do_not_reach_the_stubs(self, tmp_path: Path) -> None:
        server = TritonServer(tmp_path, python_home=tmp_path / "venv", libraries=(Path("/a"), Path("/b")))
        found = server.environment({"PATH": "/bin", "PYTHONPATH": "/x", "VIRTUAL_ENV": "/y", "LD_LIBRARY_PATH": "/c"})
        assert found == {"PATH": f"{tmp_path}/venv/bin:/bin", "LD_LIBRARY_PATH": "/a:/b:/c"}
        assert TritonServer(tmp_path).environment({"PYTHONPATH": "/x"}) == {"PYTHONPATH": "/x"}


class TestInstall:
    def test_other_systems_are_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(install_triton.platform, "machine", lambda: "riscv64")
        with pytest.raises(ServingError, match=r"Linux x86_64, not \w+ riscv64; use one of NVIDIA's Triton containers"):
            install(tmp_path / "new")
        monkeypatch.undo()
        monkeypatch.setattr(install_triton.platform, "system", lambda: "Linux")
        monkeypatch.setattr(install_triton.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(install_triton.platform, "libc_ver", lambda: ("glibc", "2.31"))
        with pytest.raises(ServingError, match=r"needs glibc 2.35 or newer, this system has 2.31"):
            install(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []

    def test_missing_python_library_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(install_triton, "_check_platform", lambda: None)
        python = install_triton._Python("/usr/bin/python3.9", 9, "")
        monkeypatch.setattr(install_triton, "_interpreters", lambda: [python])
        monkeypatch.setattr(install_triton, "_has_library", lambda python: False)
        monkeypatch.setattr(install_triton, "_can_apt", lambda: False)
        with pytest.raises(
            ServingError, match=r"libpython3\.9\.so\.1\.0, which is not installed.*libpython3\.9 \(as root\)"
        ):
            install(tmp_path / "new")
        monkeypatch.setattr(install_triton, "_interpreters", list)
        with pytest.raises(ServingError, match=r"needs a Python 3\.9, 3\.10, 3\.11, 3\.12"):
            install(tmp_path / "new")

    def test_folders_of_others_are_left_alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(install_triton, "_check_platform", lambda: None)
        monkeypatch.setattr(install_triton, "_choose_python", lambda say: install_triton._Python("/no/python", 11, ""))
        (tmp_path / "treasure").write_text("")
        with pytest.raises(ServingError, match="is no virtual environment; name another folder"):
            install(tmp_path, say=lambda text: None)
        assert (tmp_path / "treasure").exists()

    def test_failure_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(install_triton, "_check_platform", lambda: None)
        monkeypatch.setattr(install_triton, "_choose_python", lambda say: install_triton._Python("/bin/false", 11, ""))
        with pytest.raises(ServingError, match="cannot make a virtual environment"):
            install(tmp_path / "new", say=lambda text: None)
        assert list(tmp_path.iterdir()) == []


def test_installed_server_is_complete(installed_server: TritonServer) -> None:
    """The server that the other tests here use: its program loads, and its models' Python has an old NumPy."""
    environment = installed_server.environment(os.environ)
    done = subprocess.run(
        installed_server.command("--help"), env=environment, capture_output=True, text=True, check=False
    )
    assert "--model-repository" in done.stdout + done.stderr
    if installed_server.python_home is not None:
        assert in_environment(installed_server.python_home) == installed_server
        ask = [installed_server.python_home / "bin" / "python3", "-c", "import numpy; print(numpy.__version__)"]
        asked = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True)
        assert asked.stdout.startswith("1.")
