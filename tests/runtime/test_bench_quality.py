"""Quality of quantised engines: figures on a real model, and what they say where the answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apar.runtime.bench.layer_error import bench_layers
from apar.runtime.bench.quality import QualityBench, Variant, path_inputs, variants
from apar.runtime.calibration import CalibrationText
from apar.runtime.cli import main
from apar.runtime.executor import load_executor
from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def result(tiny_directory: Path) -> dict[str, Any]:
    """Rounding and gptq at 4 bits, and int8, on prompts of which some fork."""
    entries = json.loads((tiny_directory / "heldout.json").read_text(encoding="utf-8"))
    prompts = [entry["messages"] for entry in entries[::24]]
    bench = QualityBench(tiny_directory, prompts, CalibrationText(), 300, "onnx", threads=1, spinning=False)
    chosen = [Variant("int8", "rtn", 0), Variant("int4", "rtn", 128), Variant("int4", "gptq", 128)]
    return bench.run(chosen)


def test_gptq_is_closer_to_the_float_model(result: dict[str, Any]) -> None:
    plain, int8, rtn, gptq = result["engines"]
    figures = [row["prompts"]["kl_millinats"] for row in (plain, int8, gptq, rtn)]
    assert figures[0] == 0
    assert figures[1] < 0.2 * figures[2] and figures[2] < 0.8 * figures[3], figures
    # Of its answers the model is so sure that a few tokens decide: only the number of bits shows.
    answers = [row["answers"]["kl_millinats"] for row in (plain, int8, gptq)]
    assert answers[0] == 0 and answers[1] < 0.2 * answers[2]


def test_the_float_engine_agrees_with_itself(result: dict[str, Any]) -> None:
    plain = result["engines"][0]
    assert plain["same_trees"] == plain["same_answers"] == result["prompts"] == 5
    assert plain["answers"]["same_token_percent"] == 100
    assert 1 < plain["answers"]["perplexity"] < 1.1
    assert result["forks"] > 5
    assert result["tokens"]["answers"] > 200


def test_figures_of_each_engine(result: dict[str, Any]) -> None:
    assert [row["bits"] for row in result["engines"]] == [32, 8, 4.125, 4.125]
    sizes = [row["weight_bytes"] for row in result["engines"]]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]
    for row in result["engines"]:
        assert 0 <= row["same_answers"] <= row["same_trees"] <= 5
        for kind in ("prompts", "answers"):
            assert row[kind]["kl_millinats"] >= 0
            assert row[kind]["kl_millinats_p99"] >= row[kind]["kl_millinats"]


def test_a_path_is_computed_as_it_was_decoded(tiny_engine: Path) -> None:
    """Greedy tokens are the likeliest ones of the path read at once."""
    with LLM(tiny_engine, threads=1, spinning=False) as llm:
        answer = llm.generate("Where do owls live?", SamplingParams(max_tokens=60))[0]
    tokens = answer.branches[0].token_ids
    executor = load_executor(tiny_engine, "onnx", threads=1, spinning=False, num_blocks=32)
    start = len(answer.prompt_token_ids)
    logits = executor.execute(path_inputs([*answer.prompt_token_ids, *tokens][:-1], start - 1, 16))
    assert logits.argmax(axis=1).tolist() == tokens
    executor.close()


def test_variants() -> None:
    every = variants(("int8", "int4"), (32, 128))
    assert len(set(every)) == len(every) == 3 + 2 * 4
    assert {v.method for v in every if v.quantize == "int8"} == {"rtn"}
    assert Variant("int4", "rtn", 32, True).bits == 4 + 24 / 32
    assert Variant("int8", "rtn", 0).bits == 8


def test_layer_errors() -> None:
    chosen = [Variant("int4", "rtn", 64), Variant("int4", "gptq", 64), Variant("int8", "rtn", 64)]
    result = bench_layers("10m", chosen, tokens=600)
    assert result == result | json.loads(json.dumps(result))
    assert [row["columns"] for row in result["layers"]] == [256] * 3 + [704] * 3
    for rtn, gptq, int8 in (result["layers"][:3], result["layers"][3:]):
        for figure in ("error_percent", "error_percent_other_tokens"):
            assert int8[figure] < gptq[figure] < 0.6 * rtn[figure]
    again = bench_layers("10m", chosen[1:2], tokens=600)
    assert np.allclose(again["layers"][0]["error_percent"], result["layers"][1]["error_percent"])


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["bench", "quality", "--limit", "2", "--format", "int8", "--group-sizes", "64", "--threads", "1", "-q"]
    assert main([*base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bench"], found["checkpoint"], found["calibration"]) == ("quality", "tiny", "calibration.jsonl")
    assert len(found["engines"]) == 3 and "cpu" in found["machine"]
    assert main(base) == 0
    assert "int8 rtn" in capsys.readouterr().out
    shape = ["bench", "quality", "--shape", "10m", "--format", "int4", "--group-sizes", "128", "-q"]
    assert main([*shape, "--calibration-tokens", "300"]) == 0
    assert "int4 gptq" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text("{")
    for wrong in (["--group-sizes", "48"], ["--calibration", str(tmp_path / "none")], ["--prompts", str(tmp_path)]):
        assert main([*base, *wrong]) == 2
        assert "apar bench quality: error:" in capsys.readouterr().err
