"""`apar build --format ...`: what each format makes, and options that it does not have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, make_heads
from safetensors.torch import load_file, save_file

from apar.export.manifest import Manifest
from apar.runtime import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, "gqa", hidden_size=256)
    return folder


def test_a_tensorrt_llm_checkpoint_and_an_engine_from_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "trtllm"
    assert cli.main(["build", str(checkpoint), "-o", str(written), "--format", "trtllm", "--tp-size", "2"]) == 0
    assert "trtllm-build --checkpoint_dir" in capsys.readouterr().err
    engine = tmp_path / "engine"
    assert cli.main(["build", str(written), "-o", str(engine), "--tokenizer", str(checkpoint), "-q"]) == 0
    assert Manifest.load(engine).decoder.num_kv_heads == 2
    assert cli.main(["build", str(written), "-o", str(tmp_path / "other"), "-q"]) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_the_checkpoint_that_ships_is_built_by_its_name(tmp_path: Path) -> None:
    assert cli.main(["build", "tiny", "-o", str(tmp_path / "engine"), "-q"]) == 0
    assert Manifest.load(tmp_path / "engine").decoder.vocab_size == 2050


def test_a_chat_template_that_is_broken_is_told_at_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(checkpoint), "-o", str(tmp_path / "good"), "-q"]) == 0
    assert capsys.readouterr().err == ""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    settings = tmp_path / "checkpoint" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{% for x in %}"}))
    assert cli.main(["build", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "engine"), "-q"]) == 0
    said = capsys.readouterr().err
    assert "takes prompts without the chat template only" in said and "template is broken" in said
    assert cli.main(["generate", str(tmp_path / "engine"), "a", "--raw-prompt", "--max-tokens", "1"]) == 0


def test_graphs_for_tensorrt(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "graphs"
    options = ["--format", "tensorrt", "--graph-only", "--tp-size", "2", "--dtype", "bfloat16"]
    assert cli.main(["build", str(checkpoint), "-o", str(target), *options]) == 0
    assert sorted(path.name for path in target.glob("*.onnx")) == ["rank0.onnx", "rank1.onnx"]
    assert "ONNX graphs for TensorRT" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["folder", "tensors", "option"])
def test_graphs_of_medusa_heads(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "checkpoint", "gqa", hidden_size=256)
    options = ["--format", "tensorrt", "--graph-only", "--dtype", "float16"]
    if place == "tensors":
        weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
        weights["medusa_heads.0.lm_head.weight"] = weights["lm_head.weight"].clone()
        save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    else:
        folder = tmp_path / "checkpoint" / ("medusa" if place == "folder" else "of_another_name")
        make_heads(folder, hidden=256)
        options += ["--draft-heads", str(folder)] if place == "option" else []
    assert cli.main(["build", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "graphs"), *options]) == 0
    names = {path.name for path in (tmp_path / "graphs").iterdir()}
    assert names == {"rank0.onnx", "rank0.onnx.data", "rank0_medusa.onnx"}
    capsys.readouterr()
    ranks = [*options, "--tp-size", "2"]
    status = cli.main(["build", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "ranks"), *ranks])
    assert status == (1 if place == "option" else 0)
    said = "Medusa heads are built for one rank only" if place == "option" else "several ranks have no Medusa heads"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "name", "kind"),
    [
        (["--max-rows", "4"], "--max-rows", "onnx"),
        (["--tp-size", "2"], "--tp-size", "onnx"),
        (["--graph-only"], "--graph-only", "onnx"),
        (["--format", "tensorrt", "--quantize", "int8"], "--quantize", "tensorrt"),
        (["--format", "tensorrt", "--kv-dtype", "float16"], "--kv-dtype", "tensorrt"),
        (["--format", "trtllm", "--max-context", "9"], "--max-context", "trtllm"),
        (["--format", "trtllm", "--zero-points"], "--zero-points", "trtllm"),
        (["--format", "trtllm", "--overwrite"], "--overwrite", "trtllm"),
    ],
)
def test_options_of_other_formats_are_refused(
    options: list[str], name: str, kind: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(checkpoint), "-o", str(tmp_path / "x"), *options]) == 2
    assert f"{name} is not for --format {kind}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_without_tensorrt_a_build_says_what_to_do(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(checkpoint), "-o", str(tmp_path / "x"), "--format", "tensorrt", "-q"]) == 1
    assert "TensorRT's Python package cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
