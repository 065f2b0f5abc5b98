"""Recorded answers on a real engine: the same text both ways, in the steps that the trees say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apar.export.errors import ExecutorError, RequestError
from apar.runtime.bench.forced_executor import ForcedExecutor
from apar.runtime.bench.trees import TreesBench
from apar.runtime.bench.workload import plan_workload
from apar.runtime.cli import main
from apar.runtime.engine import Engine
from apar.runtime.executor import load_executor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams

TREES = [
    {"prompt_tokens": 12, "segments": [[6, 20], [4, 10], [3, 0]]},
    {"prompt_tokens": 20, "segments": [[30, 0]]},
    {"prompt_tokens": 9, "segments": [[2, 5]]},
    {"prompt_tokens": 40, "segments": [[5, 0]]},
]
PLAIN_STEPS = [6 + 20 + 4 + 10 + 3 + 1, 31, 8, 6]
"""Text tokens and the end."""
FORKED_STEPS = [6 + 1 + 20 + 1, 31, 2 + 1 + 5 + 1, 6]
"""Up to the fork that its longest detail hangs on, the fork, the detail, its end."""


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    path = tmp_path / "short.trees.json"
    path.write_text(json.dumps(TREES))
    return path


def bench(engine: Path, trees: Path, limit: int | None = None, **options: Any) -> TreesBench:
    executor = load_executor(engine, "onnx", **({"threads": 1, "spinning": False} | options))
    return TreesBench(executor, plan_workload(str(trees)), limit, threads=1)


def test_steps_and_figures(tiny_engine: Path, trees: Path) -> None:
    run = bench(tiny_engine, trees)
    try:
        result = run.run(repeat=2)
    finally:
        run.close()
    json.dumps(result)
    assert [answer["plain"]["steps"] for answer in result["answers"]] == PLAIN_STEPS
    assert [answer["forked"]["steps"] for answer in result["answers"]] == FORKED_STEPS
    assert result["all"]["step_gain"] == pytest.approx(sum(PLAIN_STEPS) / sum(FORKED_STEPS))
    assert result["forked"]["answers"] == 2
    assert result["forked"]["step_gain"] == pytest.approx((44 + 8) / (28 + 9))
    for part in (result["all"], result["forked"]):
        gain = part["plain"]["seconds"] / part["forked"]["seconds"]
        assert part["wall_gain"] == pytest.approx(gain)
        assert part["wall_gain_per_step_gain"] == pytest.approx(gain / part["step_gain"])
    assert [step["rows"] for step in result["step"]] == [1, 2, 3]
    assert result["machine"]["usable_cores"] >= 1


def test_the_example_is_the_answer_with_most_forks(tiny_engine: Path, trees: Path) -> None:
    run = bench(tiny_engine, trees)
    try:
        example = run.run()["example"]
    finally:
        run.close()
    assert example["tree"] == 0
    branches = example["branches"]
    assert [branch["parent"] for branch in branches] == [None, 0, 0]
    assert [branch["tokens"] for branch in branches[1:]] == [20, 10]
    assert all(0 <= branch["first_step"] <= branch["last_step"] for branch in branches)
    for mode, steps in (("plain", 44), ("forked", 28)):
        timeline = example[mode]
        assert {len(timeline[key]) for key in timeline} == {steps}
        assert all(a <= b for a, b in zip(timeline["blocks"], timeline["blocks_without_sharing"], strict=True))
    assert max(example["forked"]["rows"]) == 3 and max(example["plain"]["rows"]) == 1
    assert max(example["forked"]["blocks"]) > max(example["plain"]["blocks"]) // 2


def test_the_real_engine_computes_every_step(tiny_engine: Path, trees: Path) -> None:
    """The forced executor hands each step on unchanged, and its K/V are what the path's tokens give."""
    executor = load_executor(tiny_engine, "onnx", threads=1, spinning=False, num_blocks=64)
    forced = ForcedExecutor(executor, TREES)
    seen: list[Any] = []
    real: Callable[..., Any] = executor.execute

    def spy(inputs: Any) -> Any:
        logits = real(inputs)
        seen.append((inputs.input_ids.copy(), inputs.position_ids.copy(), logits.copy()))
        return logits

    executor.execute = spy  # type: ignore[method-assign]
    engine = Engine(forced, SchedulerLimits(prefix_caching=False))
    request = engine.submit("one", forced.prompt(1), SamplingParams(max_tokens=2**30, seed=0))
    while not engine.scheduler.idle:
        engine.step()
    path = np.concatenate([ids for ids, _, _ in seen])
    assert len(seen) == len(forced.records) == request.steps == 31
    assert path[:20].tolist() == forced.prompt(1)
    assert path[20:].tolist() == request.root.tokens
    assert np.concatenate([positions for _, positions, _ in seen]).tolist() == list(range(50))
    last = seen[-1][2][0]
    engine.close()
    whole = load_executor(tiny_engine, "onnx", threads=1, spinning=False, num_blocks=64)
    alone = Engine(whole, SchedulerLimits(prefix_caching=False))
    logits: list[np.ndarray] = []
    execute: Callable[..., Any] = whole.execute

    def keep(inputs: Any) -> Any:
        found = execute(inputs)
        logits.append(found.copy())
        return found

    whole.execute = keep  # type: ignore[method-assign]
    alone.submit("path", path.tolist(), SamplingParams(max_tokens=1, seed=0))
    while not alone.scheduler.idle:
        alone.step()
    alone.close()
    assert np.allclose(logits[-1][0], last, atol=1e-3)


def test_a_limit_spreads_over_the_answers(tiny_engine: Path, trees: Path) -> None:
    for limit, chosen in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])):
        run = bench(tiny_engine, trees, limit)
        assert run._chosen == chosen
        run.close()


def test_answers_that_do_not_fit_are_left_out(tiny_engine: Path, trees: Path) -> None:
    run = bench(tiny_engine, trees, num_blocks=7)  # 56 of 112 slots for one path
    try:
        result = run.run()
    finally:
        run.close()
    assert result["settings"]["left_out_too_long"] == 1
    assert [answer["tree"] for answer in result["answers"]] == [1, 2, 3]
    executor = load_executor(tiny_engine, "onnx", threads=1, spinning=False, num_blocks=1)
    with pytest.raises(RequestError, match="no answer of short fits into 8 tokens"):
        TreesBench(executor, plan_workload(str(trees)))
    executor.close()


def test_a_failed_step_is_told(tiny_engine: Path, trees: Path) -> None:
    run = bench(tiny_engine, trees)

    def fail(inputs: Any) -> Any:
        raise ExecutorError("out of order")

    run._executor._executor.execute = fail  # type: ignore[method-assign]
    with pytest.raises(ExecutorError, match="out of order"):
        run.run()
    run.close()


def test_command(
    trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "cache"))
    arguments = ["bench", "trees", "--shape", "10m", "--layers", "1", "--trees", str(trees), "--threads", "1", "-q"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["bench"], result["settings"]["shape"], result["settings"]["format"]) == ("trees", "10m", "int4")
    assert result["all"]["plain"]["steps"] == sum(PLAIN_STEPS)
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "gain in time / in steps" in shown and "answers that fork (2" in shown
