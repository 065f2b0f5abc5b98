"""The scripts around the build: a random checkpoint, and an engine of it, from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tokenizers

from apar.export.checkpoint import Checkpoint
from apar.export.manifest import Manifest
from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_random_checkpoint_becomes_an_engine(tmp_path: Path) -> None:
    source, engine = tmp_path / "random", tmp_path / "engine"
    made = run("make_checkpoint.py", source, "--shape", "10m", "--layers", 2, "--max-shard-size", 8_000_000)
    assert made.returncode == 0, made.stderr
    assert len(list(source.glob("model-*-of-*.safetensors"))) > 1
    once_more = run("make_checkpoint.py", source)
    assert once_more.returncode == 2 and "cannot be made: File exists; name a directory" in once_more.stderr
    decoder = Checkpoint.open(source).decoder
    assert (decoder.num_layers, decoder.vocab_size) == (2, 32002)
    built = run("build_engine.py", source, "-o", engine, "--quantize", "int4", "--group-size", 64)
    assert built.returncode == 0, built.stderr
    manifest = Manifest.load(engine)
    assert (manifest.quantize, manifest.group_size, manifest.tokens.fork) == ("int4", 64, 259)
    tokenizer = tokenizers.Tokenizer.from_file(str(engine / "tokenizer.json"))
    text = "Grüße, 世界!\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with LLM(engine, num_blocks=16, threads=1) as llm:
        assert llm.tokenizer.decode(llm.tokenizer.encode_text(text)) == text
        answer = llm.generate(text, SamplingParams(max_tokens=12, ignore_eos=True), chat=False)[0]
    assert answer.usage.completion_tokens == 12
    again = run("build_engine.py", source, "-o", engine)
    assert again.returncode == 1
    assert "error: " in again.stderr
    assert "Traceback" not in again.stderr
