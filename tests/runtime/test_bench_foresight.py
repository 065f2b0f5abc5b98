"""Schedules that know every answer: the bound by hand, who is turned away, what knowing is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_models import UNIT

from apar.runtime.bench.cost_model import CostModel, ModelStepCost
from apar.runtime.bench.foresight import Answer, Foreseeing, Told, bench_foresight, heaviest, parts, shortest_run
from apar.runtime.bench.replay import ReplayBench
from apar.runtime.bench.workload import Workload, plan_workload
from apar.runtime.cli import main
from apar.runtime.limits import SchedulerLimits
from apar.runtime.service_level import ServiceLevel

PLAIN = {"prompt_tokens": 20, "segments": [[6, 0]]}
FORKING = {"prompt_tokens": 20, "segments": [[6, 9], [3, 0]]}
LONG = {"prompt_tokens": 20, "segments": [[90, 0]]}
ADAPTIVE = SchedulerLimits(fork_policy="adaptive")


def answers_of(*trees: dict[str, Any]) -> list[Answer]:
    return [Answer.of(tree, UNIT, ADAPTIVE, 4) for tree in trees]


class TestBound:
    def test_an_answer_alone(self) -> None:
        (answer,) = answers_of(PLAIN)
        moved = 20 + 20 + sum(1 + 20 + i for i in range(1, 7))
        assert (answer.steps, answer.samples, answer.rows) == (7, 7, 7)
        assert answer.blocks == 5 + 4 * 6 + 2 * 7  # 20 tokens, 21 to 24, 25 and 26, in blocks of 4
        assert answer.moved_bytes == moved
        assert answer.alone == answer.unforked == 7 * 1005 + moved

    def test_a_fork_takes_rows_but_no_step(self) -> None:
        (answer,) = answers_of(FORKING)
        assert answer.alone < answer.unforked
        assert answer.rows > answer.steps

    def test_by_hand(self) -> None:
        """Three short answers and a long one: what binds is named, and the seconds are the steps and bytes it takes."""
        answers = answers_of(PLAIN, LONG)
        short, long = answers
        closed = Workload("some", [PLAIN, LONG], [0, 0, 0, 1], None, 4)
        moved = 3 * short.moved_bytes + long.moved_bytes
        assert shortest_run(closed, answers, UNIT, 256, 1000) == (long.steps * 1005 + moved, "the longest answer")
        rows = 3 * short.rows + long.rows
        assert shortest_run(closed, answers, UNIT, 1, 1000) == (rows * 1005 + moved, "rows")
        held = 3 * short.blocks + long.blocks
        assert shortest_run(closed, answers, UNIT, 256, 10) == (held / 10 * 1005 + moved, "blocks")
        late = Workload("some", [PLAIN, LONG], [0, 0, 0, 1], [0.0, 0.0, 0.0, 1e6])
        assert shortest_run(late, answers, UNIT, 256, 1000) == (1e6 + long.alone, "arrivals")

    @pytest.mark.parametrize(("rows", "blocks"), [(4, None), (64, 64), (64, None)])
    @pytest.mark.parametrize("load", [{"concurrency": 9}, {"requests_per_second": 0.02}])
    def test_nobody_beats_it(self, tmp_path: Path, rows: int, blocks: int | None, load: dict[str, Any]) -> None:
        path = tmp_path / "some.json"
        path.write_text(json.dumps([PLAIN, FORKING, LONG]))
        limits = SchedulerLimits(max_rows=rows, service_level=ServiceLevel(8000.0, 2.5))
        workload = plan_workload(str(path), requests=30, **load)
        result = bench_foresight(workload, UNIT, limits, kv_blocks=blocks, block_size=4, given_up=(0.2,))
        runs = [result["always"], result["adaptive"], *result["adaptive_told_the_heaviest"], *result["all_known"]]
        assert len(runs) == 5
        assert max(run["requests_per_second"] for run in runs) <= result["bound"]["requests_per_second"]
        assert result["best"] == max(run["goodput"] for run in runs)


def test_the_heaviest_are_turned_away() -> None:
    answers = answers_of(PLAIN, LONG)
    order = [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    closed = Workload("some", [PLAIN, LONG], order, None, 4)
    assert np.flatnonzero(heaviest(closed, answers, 0.5)).tolist() == [1, 9]
    assert not heaviest(closed, answers, 0.0).any()
    at_a_rate = Workload("some", [PLAIN, LONG], order, [float(i) for i in range(10)])
    assert np.flatnonzero(heaviest(at_a_rate, answers, 0.5)).tolist() == [1]


def test_told_nothing_is_adaptive() -> None:
    """The policy that is told whom to turn away decides like `adaptive` where that is nobody, to the last digit."""
    found = []
    for told in (False, True):
        workload = plan_workload("vicuna-7b", requests=60, requests_per_second=60.0)
        bench = ReplayBench(workload, CostModel(), limits=SchedulerLimits(max_rows=24, fork_policy="adaptive"))
        if told:
            scheduler = bench.engine.scheduler
            scheduler.use_policy(Told(scheduler, CostModel(), np.zeros(60, dtype=bool)))
        result = bench.run()
        bench.engine.scheduler.check()
        found.append((result["duration"], result["goodput"], result["latency"], result["pauses"]))
    assert found[0] == found[1]
    assert found[0][3] > 0


def test_whoever_has_least_time_left_goes_first() -> None:
    """Three answers of seven steps, two rows: the last one is done first, unless it was given up."""

    def last_ended(given_up: list[bool]) -> int:
        workload = Workload("three", [PLAIN], [0, 0, 0], [0.0, 0.0, 0.0])
        limits = SchedulerLimits(max_rows=2, fork_policy="adaptive", service_level=ServiceLevel(1e6, 2.5))
        bench = ReplayBench(workload, UNIT, limits=limits)
        scheduler, allowed = bench.engine.scheduler, np.array([90000.0, 90000.0, 20000.0])
        scheduler.use_policy(Foreseeing(scheduler, UNIT, np.array([7, 7, 7]), allowed, np.array(given_up)))
        bench.run()
        return sorted(range(3), key=lambda index: bench.replies[index].finished).index(2)

    assert last_ended([False, False, False]) == 0
    assert last_ended([False, False, True]) == 2


@pytest.mark.slow
def test_what_knowing_is_worth(tmp_path: Path) -> None:
    """One answer in ten is fifteen times as long as the others: the same digits on every machine."""
    path = tmp_path / "some.json"
    short, long = ({"prompt_tokens": 30, "segments": [[tokens, 0]]} for tokens in (60, 900))
    path.write_text(json.dumps([*[short] * 9, long]))
    workload = plan_workload(str(path), requests=150, requests_per_second=80.0)
    result = bench_foresight(workload, CostModel(), SchedulerLimits(max_rows=16), given_up=(0.1,))
    always, adaptive = (result[name]["goodput"] for name in ("always", "adaptive"))
    told, known = (result[name][-1]["goodput"] for name in ("adaptive_told_the_heaviest", "all_known"))
    assert always < adaptive < 0.7 * told < 0.7 * known


def test_parts_are_those_of_the_scheduler() -> None:
    bench = ReplayBench(plan_workload("vicuna-7b", requests=1), CostModel())
    *others, cost = parts(bench.engine.scheduler, CostModel())
    assert others[2] is bench.engine.scheduler.requests
    assert isinstance(cost, ModelStepCost)


class TestCommand:
    def test_json_and_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "some.json"
        path.write_text(json.dumps([PLAIN, FORKING, LONG]))
        arguments = ["bench", "foresight", "--trees", str(path), "--requests", "9", "--concurrency", "3", "-q"]
        assert main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["requests"] == 9 and result["settings"]["concurrency"] == 3
        assert "fork_policy" not in result["settings"]
        assert [entry["given_up"] for entry in result["all_known"]] == [0.0, 0.03, 0.07]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert "all answers known" in printed and "no schedule with these forks exceeds" in printed

    def test_an_unusable_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "foresight", "--trees", "no-such-file"]) == 1
        assert main(["bench", "foresight", "--kv-blocks", "3"]) == 2
        assert "3 KV blocks" in capsys.readouterr().err
