"""Drafts by measured time: they are used where they pay, given up where they do not, and no larger than pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apar.runtime.engine import Engine
from apar.runtime.executor import load_executor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.budget import DraftBudget
from apar.runtime.speculative.draft_cost import DraftCost
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.speculative.pace import AGAIN, BASELINE, CHECK, CHECKED, GLIMPSE, LATEST, TRIAL, Pace
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.step import Float32Array, StepInputs
from apar.runtime.text_engine import TextEngine
from apar.runtime.tokenizer import Tokenizer


def drive(pace: Pace, steps: int, plain: float, drafted: tuple[float, int], rows: int = 1) -> list[bool]:
    """Which of so many steps drafted; `plain` seconds a step, `drafted` seconds and tokens."""
    ways = []
    for _ in range(steps):
        way = pace.choose(rows)
        seconds, tokens = drafted if way else (plain, rows)
        pace.observe(rows, tokens, seconds, way)
        ways.append(way)
    return ways


def test_drafts_that_pay_are_used() -> None:
    ways = drive(Pace(True), 4 * CHECK, plain=1.0, drafted=(2.0, 3))
    assert ways[:BASELINE] == [False] * BASELINE, "the plain way is measured first"
    assert all(ways[BASELINE : BASELINE + CHECK])
    assert 0 < ways[BASELINE:].count(False) <= 4 * CHECKED, "and now and then again"


def test_drafts_that_lose_are_given_up_at_once() -> None:
    pace = Pace(True)
    ways = drive(pace, 100_000, plain=1.0, drafted=(4.0, 2))
    assert ways[: BASELINE + TRIAL].count(True) == GLIMPSE
    trials = np.flatnonzero(np.diff(np.array(ways, int)) == 1)
    gaps = np.diff(trials)
    assert gaps[0] >= AGAIN and (np.diff(gaps) >= 0).all() and gaps[-1] <= LATEST + TRIAL
    lost = sum(3.0 for way in ways if way)
    assert lost < 0.005 * len(ways), "what trials cost"


def test_drafts_that_just_lose_cost_little_and_those_that_just_win_are_taken() -> None:
    assert drive(Pace(True), 1000, plain=1.0, drafted=(2.1, 2))[-1] is False
    assert drive(Pace(True), 1000, plain=1.0, drafted=(1.8, 2))[-1] is True


def test_a_change_of_the_machine_is_noticed() -> None:
    pace = Pace(True)
    assert drive(pace, 100, plain=1.0, drafted=(1.2, 2))[-1]
    assert not drive(pace, 4 * CHECK, plain=1.0, drafted=(3.0, 2))[-1], "drafts have become dear"
    assert drive(pace, 8 * AGAIN, plain=1.0, drafted=(1.2, 2))[-1], "and cheap again"


def test_each_number_of_rows_is_judged_apart() -> None:
    pace = Pace(True)
    assert drive(pace, 100, plain=1.0, drafted=(1.2, 2), rows=1)[-1]
    assert not drive(pace, 100, plain=1.0, drafted=(3.0, 6), rows=4)[-1]
    assert pace.choose(1) and not pace.choose(4)
    assert not any(drive(pace, AGAIN - 1, plain=1.0, drafted=(1.2, 20), rows=9)), "more rows than where drafts lost"
    assert drive(pace, 2 * AGAIN, plain=1.0, drafted=(1.2, 20), rows=9)[-1]


def test_one_long_step_decides_nothing() -> None:
    pace = Pace(True)
    assert drive(pace, 60, plain=1.0, drafted=(1.2, 2))[-1]
    drive(pace, 1, plain=1.0, drafted=(500.0, 2))
    assert drive(pace, CHECK + 60, plain=1.0, drafted=(1.2, 2))[-1]


def test_without_measuring_every_step_drafts() -> None:
    assert all(drive(Pace(False), 50, plain=1.0, drafted=(90.0, 1)))


def test_cost_is_fitted() -> None:
    cost, random = DraftCost(), np.random.default_rng(0)
    for step in range(200):
        drafted, tokens = step % 3 > 0, int(random.integers(1, 20))
        cost.observe(tokens, (0.5 + 0.1 * tokens + 1.5 * drafted) * random.uniform(0.95, 1.05), drafted)
    assert cost.ready
    assert cost.base == pytest.approx(2.0, rel=0.1) and cost.per_token == pytest.approx(0.1, rel=0.1)


def test_a_draft_is_as_large_as_pays() -> None:
    sizes = []
    for per_token in (0.0, 0.02, 0.1, 0.5):
        cost = DraftCost()
        cost.ready, cost.base, cost.per_token = True, 1.0, per_token
        rule = DraftBudget(DraftTree(DraftOptions("medusa").paths(4)), True, capacity=2, cost=cost)
        rule.skill[:] = 0.9
        most = np.array([51, 51], np.int32)
        sizes.append(int(rule.sizes(np.arange(2), most, 64, taken=2).sum()))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 30 and 1 <= sizes[-1] <= 4
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(("per_token", "drafts"), [(0.0, True), (1.0, False)])
def test_an_engine_drafts_where_tokens_are_cheap(
    per_token: float, drafts: bool, tiny_engine: Path, heldout: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the model's work moves: a step's tokens cost nothing, or as much as the rest of the step."""
    executor, tokenizer = load_executor(tiny_engine, "onnx", threads=1), Tokenizer.load(tiny_engine)
    clock = [0.0]
    execute = executor.execute

    def timed(inputs: StepInputs) -> Float32Array:
        clock[0] += 1.0 + per_token * inputs.input_ids.size
        return execute(inputs)

    monkeypatch.setattr(executor, "execute", timed)
    found = []
    for draft in (None, "medusa"):
        engine = Engine(executor, SchedulerLimits(prefix_caching=False), draft=draft, clock=lambda: clock[0])
        clock[0] = 0.0
        text, words = TextEngine(engine, tokenizer), []
        for entry in heldout[:8]:
            answer = text.submit(text.encode(entry["messages"]), SamplingParams(max_tokens=400, temperature=0.0))
            while not text.idle:
                text.step()
            words.append(answer.output().text)
        found.append((words, clock[0], engine.scheduler.load()))
    executor.close()
    (plain_words, plain_time, _), (words, took, load) = found
    assert words == plain_words
    if drafts:
        assert took < 0.8 * plain_time
    else:
        assert took < 1.05 * plain_time, "trials cost little"
        assert load["draft_tokens"] < 200
