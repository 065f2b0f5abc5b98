"""`apar bench serve`, with a service of its own and with one that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apar.runtime.cli import main
from apar.runtime.cli.engine_options import add_engine_options, engine_arguments
from apar.runtime.cli.parser import Parser

SMALL = ["--requests", "3", "--streams", "1", "2", "--max-tokens", "12", "--limit", "3", "-q"]


def test_own_service_beside_the_runtime(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", str(tiny_engine), "--threads", "1", *SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["streams"], r["mode"]) for r in result["records"]] == [
        (1, "plain"), (1, "forked"), (2, "plain"), (2, "forked"),
    ]  # fmt: skip
    for record in result["records"]:
        service, runtime = record["service"], record["runtime"]
        assert service["requests"] == runtime["requests"] == 3
        assert service["tokens"] == runtime["tokens"] > 0, "greedy: the same answers"
        assert 0 < service["first_token_ms"]["p50"] <= service["answer_ms"]["p50"]
        rate = 1 / service["tokens_per_second"] - 1 / runtime["tokens_per_second"]
        assert record["overhead_us_per_token"] == pytest.approx(1e6 * rate)


def test_engine_options_reach_the_service() -> None:
    parser = Parser(prog="test")
    add_engine_options(parser)
    given = {"--executor": "onnx", "--graph": "portable", "--threads": "3", "--num-blocks": "7", "--max-rows": "9"}
    given |= {"--device": "cpu", "--weights": "fp8", "--host-blocks": "6"}
    given |= {"--max-step-tokens": "99", "--fork-policy": "adaptive", "--slo-first-token": "2", "--slo-latency": "3"}
    sizes = {"--num-blocks": "--kv-memory-mb", "--host-blocks": "--kv-host-memory-mb"}
    for more in (["--no-spinning"], ["--spinning", "--kv-memory-mb", "5", "--kv-host-memory-mb", "7"]):
        chosen = {k: v for k, v in given.items() if sizes.get(k) not in more}
        options = parser.parse_command(["engine", *(part for pair in chosen.items() for part in pair), *more])
        again = parser.parse_command(["engine", *engine_arguments(options)])
        assert vars(again) == vars(options)
    unset = {action.dest for action in parser._actions} - {"help", "engine"}
    assert unset == {option.removeprefix("--").replace("-", "_") for option in given} | {
        "kv_memory_mb",
        "kv_host_memory_mb",
        "spinning",
    }


def test_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *SMALL]) == 2
    assert "give an ENGINE, or the --url" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "http://127.0.0.1:1/v1", *SMALL]) == 1
    assert "names no model" in capsys.readouterr().err
