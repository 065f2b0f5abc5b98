"""The build: engine directories that are whole or absent, options, weights read back, bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint

from apar.export import manifest as m
from apar.export import output_directory
from apar.export.engine_weights import read_weights
from apar.export.errors import BuildError, CheckpointError, EngineError
from apar.export.onnx_engine import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small-model"
    make_checkpoint(path, "gqa")
    return path


def stacked(state: dict[str, torch.Tensor], *names: str) -> np.ndarray:
    return np.concatenate([state[name].numpy() for name in names])


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_read_back_are_the_checkpoints(variant: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    build(tmp_path / "checkpoint", tmp_path / "engine")
    weights, state = read_weights(tmp_path / "engine"), model.state_dict()
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for leaf in ("weight", "bias"):
            parts = {"qkv": [f"{attention}.{n}_proj.{leaf}" for n in "qkv"], "o": [f"{attention}.o_proj.{leaf}"]}
            parts |= {
                "gate_up": [f"{mlp}.{n}_proj.{leaf}" for n in ("gate", "up")],
                "down": [f"{mlp}.down_proj.{leaf}"],
            }
            for name, sources in parts.items():
                if variant == "qwen2" and f"{name}.{leaf}" == "o.bias":
                    assert not weights[f"layers.{i}.o.bias"].any()
                    continue
                assert (f"layers.{i}.{name}.{leaf}" in weights) == (sources[0] in state)
                if sources[0] in state:
                    np.testing.assert_array_equal(weights[f"layers.{i}.{name}.{leaf}"], stacked(state, *sources))
    np.testing.assert_array_equal(weights["embed.weight"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights["lm_head.weight"], state["lm_head.weight"])
    np.testing.assert_array_equal(weights["norm.weight"], state["model.norm.weight"])
    assert all(array.dtype == np.float32 for array in weights.values())


def test_manifest_describes_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    built = build(checkpoint, tmp_path / "engine", max_context=99, progress=lambda *event: stages.append(event))
    loaded = m.Manifest.load(tmp_path / "engine")
    assert loaded == built
    assert (loaded.source, loaded.decoder.max_context, loaded.block_size) == ("small-model", 99, 16)
    assert (loaded.dtype, loaded.kv_dtype, loaded.quantize, loaded.group_size) == ("float32", "float32", "none", 0)
    assert loaded.apar_version
    present = {path.name for path in (tmp_path / "engine").iterdir()}
    assert set(loaded.files) | {m.MANIFEST_NAME} == present
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} < present
    weights = [event for event in stages if event[0] == "weights"]
    assert weights[-1][1] == weights[-1][2] == (checkpoint / "model.safetensors").stat().st_size - header(checkpoint)
    assert [event[1] for event in weights] == sorted(event[1] for event in weights)
    assert stages[-1] == ("graph", 2, 2)


def header(checkpoint: Path) -> int:
    return 8 + int.from_bytes((checkpoint / "model.safetensors").read_bytes()[:8], "little")


def test_a_link_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "engine"
    disk.mkdir()
    link.symlink_to(disk / "engine")
    for size in (16, 32):
        build(checkpoint, link, overwrite=True, block_size=size)
        assert link.is_symlink() and m.Manifest.load(disk / "engine").block_size == size
    assert [path.name for path in disk.iterdir()] == ["engine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "engine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not supported; choose one of auto, float32, float16, bfloat16"),
        ({"quantize": "fp8"}, "quantize 'fp8' is not supported"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype 'bfloat16' is not supported"),
        ({"block_size": 17}, "block_size 17 is not supported"),
        ({"group_size": 32}, "group_size has no meaning without quantize"),
        ({"quantize": "int4", "group_size": 48}, "group_size 48 is not supported; choose one of 16, 32"),
        ({"quantize_method": "rtn"}, "have no meaning without quantize"),
        ({"zero_points": True}, "have no meaning without quantize"),
        ({"quantize": "int4", "quantize_method": "awq"}, "quantize_method 'awq' is not supported; choose one of rtn"),
        ({"quantize": "int4", "quantize_method": "gptq"}, "quantize_method gptq needs a calibration"),
        ({"quantize": "int4", "calibration": lambda *_: []}, "the calibration has no tokens"),
        ({"max_context": 257}, "max_context 257 is not between 1 and 256"),
        ({"max_context": 0}, "max_context 0 is not between"),
    ],
)
def test_option_errors(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build(checkpoint, tmp_path / "engine", **options)
    assert not any(tmp_path.iterdir())


def test_existing_output(checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    build(checkpoint, engine)  # an empty directory is fine
    with pytest.raises(BuildError, match=r"holds an engine already; choose .* or pass --overwrite"):
        build(checkpoint, engine)
    build(checkpoint, engine, overwrite=True, block_size=32)
    assert m.Manifest.load(engine).block_size == 32
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(BuildError, match="exists and is no engine, so it is never overwritten"):
        build(checkpoint, other, overwrite=True)
    assert (other / "letter.txt").read_text() == "dear"


def test_failed_overwrite_leaves_the_old_engine(checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    old = build(checkpoint, engine)

    def fail(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, engine, overwrite=True, quantize="int8", progress=fail)
    assert m.Manifest.load(engine) == old
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_disk_space_is_checked_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(output_directory.shutil, "disk_usage", lambda _: Usage(1000))
    with pytest.raises(BuildError, match=r"has 0\.00 GB free, the engine needs 0\.07 GB; make room"):
        build(checkpoint, tmp_path / "engine")
    assert not any(tmp_path.iterdir())


def test_killed_build_leaves_nothing_that_loads(checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from apar.export.onnx_engine import build
        def die(stage, done, total):
            if stage == sys.argv[3] and done > 0.6 * total:
                os.kill(os.getpid(), signal.SIGKILL)
        build(Path(sys.argv[1]), Path(sys.argv[2]), progress=die, overwrite=True)
        """
    )
    for stage in ("weights", "graph"):
        result = subprocess.run([sys.executable, "-c", script, checkpoint, engine, stage], check=False)
        assert result.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".engine.partial-")
        for directory in (engine, left):
            with pytest.raises(EngineError, match=r"is not a directory|holds no manifest\.json"):
                m.Manifest.load(directory)
    build(checkpoint, engine)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_builds_at_the_same_time_leave_each_other_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Also where they have the same number, or one that nobody has here: in containers that share a disk."""
    engine, inside = tmp_path / "engine", threading.Event()
    finished = threading.Event()
    found: list[m.Manifest] = []

    def wait(stage: str, done: int, total: int) -> None:
        if stage == "graph" and done == 0:
            inside.set()
            assert finished.wait(60)

    def first() -> None:
        found.append(build(checkpoint, engine, overwrite=True, progress=wait))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    (partial,) = tmp_path.iterdir()
    stranger = partial.with_name(".engine.partial-4000000-0123abcd")  # as another container sees it
    partial.rename(stranger)
    try:
        second = build(checkpoint, engine, block_size=32)
        assert m.Manifest.load(engine) == second
        assert {path.name for path in tmp_path.iterdir()} == {"engine", stranger.name}
    finally:
        stranger.rename(partial)
        finished.set()
        thread.join(60)
    assert m.Manifest.load(engine) == found[0] != second
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_an_engine_that_cannot_be_put_in_place_leaves_the_old_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"
    old = build(checkpoint, engine)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match="cannot be put in place"):
        build(checkpoint, engine, overwrite=True, block_size=32)
    assert m.Manifest.load(engine) == old
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_death_between_the_two_renames_is_mended(checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    build(checkpoint, engine)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    engine.rename(tmp_path / f".engine.old-{int(dead.stdout)}")
    with pytest.raises(BuildError, match="holds an engine already"):
        build(checkpoint, engine)
    assert m.Manifest.load(engine).source == "small-model"


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint")
    for value, options, error, message in (
        (float("nan"), {}, CheckpointError, "holds NaN or infinity"),
        (float("inf"), {"quantize": "int4"}, CheckpointError, "holds NaN or infinity"),
        (1e6, {"dtype": "float16"}, BuildError, "beyond float16's range; build with dtype bfloat16"),
    ):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        model.save_pretrained(tmp_path / "checkpoint")
        with pytest.raises(error, match=message):
            build(tmp_path / "checkpoint", tmp_path / "engine", **options)
        assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "holds no manifest.json, so it is no engine"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "manifest.json").write_text("[]"), "has no format_version"),
        (lambda d: edit(d, format_version=99), "has format_version 99, this version of APAR reads 2; build"),
        (lambda d: edit(d, abi_version=0), "has abi_version 0"),
        (lambda d: edit(d, linear_abi_version=9), "has linear_abi_version 9, this version of APAR reads 1; build"),
        (lambda d: edit(d, tokens={}), "does not follow the manifest schema"),
        (lambda d: edit(d, surprise=1), "does not follow the manifest schema"),
        (lambda d: edit(d, block_size="x"), r"manifest schema \(block_size is 'x'\)"),
        (lambda d: edit(d, block_size=0), r"manifest schema \(block_size is 0\)"),
        (lambda d: edit(d, block_size=True), r"manifest schema \(block_size is True\)"),
        (lambda d: edit(d, kv_dtype="int3"), "manifest schema .types are float32, int3 and none"),
        (lambda d: edit(d, files=[1]), r"manifest schema \(files is \[1\]\)"),
        (lambda d: edit(d, files={"model.onnx": "x"}), "manifest schema .files is"),
        (lambda d: edit(d, tokens={"fork": 1, "child": "x", "eos": [2]}), r"manifest schema \(child is 'x'\)"),
        (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda d: os.truncate(d / "model.onnx.data", 100), "has 100 bytes, the manifest says"),
    ],
)
def test_damaged_engines(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    build(checkpoint, tmp_path / "engine")
    change(tmp_path / "engine")
    with pytest.raises(EngineError, match=message):
        read_weights(tmp_path / "engine")


def edit(directory: Path, **changes: Any) -> None:
    path = directory / m.MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_graph(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, tmp_path / "engine")
    (tmp_path / "engine" / m.GRAPH_NAME).write_bytes(b"\xff" * manifest.files[m.GRAPH_NAME])
    with pytest.raises(EngineError, match=r"model\.onnx cannot be read"):
        read_weights(tmp_path / "engine")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_memory_stays_far_below_the_checkpoint(quantize: str, tmp_path: Path) -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("needs 10 GB of disk")
    source = tmp_path / "1b"
    try:
        subprocess.run([sys.executable, scripts / "make_checkpoint.py", source, "--shape", "1b"], check=True)
        command = "import resource, sys, pathlib as p; from apar.export.onnx_engine import build; "
        command += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        command += "build(p.Path(sys.argv[1]), p.Path(sys.argv[2]), quantize=sys.argv[3]); "
        command += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        run = [sys.executable, "-c", command, source, tmp_path / "engine", quantize]
        grown = int(subprocess.run(run, capture_output=True, check=True).stdout) * 1024
        assert grown < 300e6  # of a 2.2 GB checkpoint
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(tmp_path / "engine", ignore_errors=True)
