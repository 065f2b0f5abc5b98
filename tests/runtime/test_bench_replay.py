"""Recorded answers on a virtual clock: counts, closed forms, the same text under every policy, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_models import UNIT

from apar.export.errors import AparError, RequestError
from apar.runtime.bench.cost_model import MAY_BE_ZERO, CostModel, StepWork, load_cost_model
from apar.runtime.bench.replay import ReplayBench
from apar.runtime.bench.workload import Workload, forks, plan_workload, poisson
from apar.runtime.cli import main
from apar.runtime.executor.recorded_trees import text_tokens
from apar.runtime.limits import ForkPolicy, SchedulerLimits
from apar.runtime.service_level import ServiceLevel
from apar.runtime.step import StepInputs

Trees = list[dict[str, Any]]

PLAIN: Trees = [{"prompt_tokens": 20, "segments": [[6, 0]]}]
FORKING: Trees = [{"prompt_tokens": 20, "segments": [[6, 9], [3, 0]]}]
MIXED: Trees = [
    {"prompt_tokens": 21, "segments": [[5, 9], [3, 0], [4, 17], [1, 1]]},
    {"prompt_tokens": 9, "segments": [[12, 0]]},
    {"prompt_tokens": 40, "segments": [[2, 3], [2, 30], [1, 12]]},
    {"prompt_tokens": 7, "segments": [[1, 2], [1, 0]]},
]

POLICIES: tuple[ForkPolicy, ...] = ("always", "never")


def replay(
    trees: Trees,
    model: CostModel = UNIT,
    *,
    order: list[int] | None = None,
    concurrency: int = 1,
    arrivals: list[float] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], ReplayBench]:
    workload = Workload("trees", trees, order or list(range(len(trees))), arrivals, concurrency)
    bench = ReplayBench(workload, model, **{"block_size": 4, **options})
    result = bench.run()
    bench.engine.scheduler.check()
    assert bench.engine.cache.num_referenced == 0
    return result, bench


def seconds(tokens: int, kv: int, copied: int = 0) -> float:
    """What a step costs under UNIT."""
    return 1000 + 5 + tokens + kv + 2 * copied


@pytest.fixture
def trees_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.trees.json"
    path.write_text(json.dumps(MIXED))
    return path


class TestVicuna:
    def test_every_fork_is_free(self) -> None:
        """A request's steps do not depend on what else runs, so all 80 may run at once here."""
        workload = plan_workload("vicuna-7b", requests=80, concurrency=80)
        result = ReplayBench(workload, CostModel(), limits=SchedulerLimits(max_rows=512)).run()
        assert result["tokens"] == 27428
        assert result["request_steps"] == 20748
        assert result["forks"] == 230 == sum(forks(tree) for tree in workload.trees)
        assert round(result["step_reduction"], 2) == 1.32
        assert round(result["step_reduction_forked"], 2) == 1.89

    @pytest.mark.slow
    def test_one_request_at_a_time(self) -> None:
        result = ReplayBench(plan_workload("vicuna-7b"), CostModel()).run()
        assert (result["steps"], result["request_steps"], result["tokens"]) == (20748, 20748, 27428)


class TestClosedForms:
    def test_an_answer_without_forks(self) -> None:
        result, bench = replay(PLAIN)
        prefill, decode = seconds(20, 20), [seconds(1, 20 + i) for i in range(1, 7)]
        assert result["steps"] == 7 and result["step_reduction"] == 6 / 7
        assert bench.replies[0].wait == prefill
        assert bench.replies[0].latency == result["duration"] == result["busy"] == prefill + sum(decode)
        assert UNIT.unloaded_seconds(20, 6, 1024) == bench.replies[0].latency
        assert result["tokens_attended"] == 20 * 21 // 2 + sum(range(21, 27))
        assert result["mean_rows"] == 1

    def test_a_prompt_in_chunks(self) -> None:
        result, bench = replay(PLAIN, limits=SchedulerLimits(max_rows=4, max_step_tokens=8))
        chunks = [seconds(8, 8), seconds(8, 16), seconds(4, 20)]
        assert bench.replies[0].wait == sum(chunks)
        assert bench.replies[0].latency == UNIT.unloaded_seconds(20, 6, 8)
        assert result["steps"] == 9

    @pytest.mark.parametrize("shared", [True, False])
    def test_a_fork(self, shared: bool) -> None:
        """Root: 6 text, [Fork], 3 text, EOS; the child's 9 text and EOS decide when it ends."""
        model = CostModel(**{**fields(UNIT), "shared_prefix_reads": shared})
        result, bench = replay(FORKING, model)
        # The prompt and 6 tokens are 26: the root samples [Fork] at position 26. In the child's first step both
        # have a token to compute there; the child copies slots 24 and 25, and shares 6 full blocks of 4.
        once = 24 if shared else 0
        born = seconds(3, 27 + 28 - once, copied=2)
        both = sum(seconds(2, 27 + i + 28 + i - once) for i in range(1, 4))
        child = sum(seconds(1, 28 + i) for i in range(4, 10))
        alone = seconds(20, 20) + sum(seconds(1, 20 + i) for i in range(1, 7))
        assert bench.replies[0].latency == alone + born + both + child
        assert result["steps"] == result["request_steps"] == 7 + 1 + 3 + 6
        assert result["forks"] == 1 and result["tokens"] == 18

    def test_operations_decide_where_they_are_more(self) -> None:
        model = CostModel(**{**fields(UNIT), "flops_per_token": 300.0, "flops_per_pair": 2.0, "flops_per_second": 2.0})
        work = StepWork.one_row(20, 20)
        assert model.seconds(work) == (300 * 20 + 2 * 210) / 2 + 5
        assert model.seconds(StepWork.one_row(1, 21)) == 1000 + 21 + 1 + 5

    def test_swaps(self) -> None:
        """Copies out go on beside the step, which waits for those that come in."""
        model = CostModel(**{**fields(UNIT), "host_bytes_per_second": 2.0})
        work = StepWork.one_row(1, 20)
        alone = 1000 + 21 + 5
        assert model.seconds(work) == alone
        assert model.seconds(dataclasses.replace(work, swapped_out=2000)) == alone
        assert model.seconds(dataclasses.replace(work, swapped_out=2400)) == 1200 + 5
        assert model.seconds(dataclasses.replace(work, swapped_out=2400, swapped_in=32)) == 1200 + 5 + 16

    def test_work_of_a_step(self) -> None:
        empty = np.zeros((0, 2), np.int32)
        array = lambda *values: np.array(values, np.int32)  # noqa: E731
        inputs = StepInputs(
            input_ids=np.zeros(6, np.int32),
            position_ids=np.zeros(6, np.int32),
            query_start=array(0, 1, 3, 6),
            kv_len=array(10, 11, 7),
            block_table=np.zeros((3, 4), np.int32),
            slot_mapping=np.zeros(6, np.int32),
            slot_copies=empty,
            prefix_rows=array(0, 2, 3),
            prefix_blocks=array(2, 0),
            tree_mask=np.zeros((6, 0), np.int32),
            logits_rows=array(0, 2, 5),
        )
        assert StepWork.of(inputs, 4) == StepWork(3, 6, 28, 8, 0, 10 + (10 + 11) + (5 + 6 + 7))


class TestLoad:
    def test_arrivals_are_waited_for(self) -> None:
        alone = UNIT.unloaded_seconds(20, 6, 1024)
        result, bench = replay(PLAIN, order=[0, 0], arrivals=[0.0, 50_000.0])
        assert [reply.latency for reply in bench.replies] == pytest.approx([alone, alone])
        assert result["duration"] == pytest.approx(50_000 + alone) and result["busy"] == pytest.approx(2 * alone)
        assert result["throughput"]["requests_per_second"] == pytest.approx(2 / (50_000 + alone))

    def test_an_arrival_during_a_step_waits_for_its_end(self) -> None:
        _, bench = replay(PLAIN, order=[0, 0], arrivals=[0.0, 1.0])
        first = seconds(20, 20)
        assert bench.replies[1].first_token == first + seconds(21, 21 + 20)

    def test_a_closed_loop_keeps_its_number_in_flight(self) -> None:
        _, bench = replay(MIXED, order=[0, 1, 2, 3, 0, 1, 2, 3], concurrency=3)
        replies = bench.replies
        for reply in replies[3:]:
            assert any(other.finished == reply.arrived for other in replies)
        for reply in replies:
            assert sum(r.arrived <= reply.arrived < r.finished for r in replies) <= 3

    def test_goodput(self) -> None:
        alone = UNIT.unloaded_seconds(20, 6, 1024)
        level = ServiceLevel(first_token_seconds=1500.0, latency_factor=1.5)
        result, _ = replay(PLAIN, order=[0, 0], arrivals=[0.0, 1.0], limits=SchedulerLimits(service_level=level))
        assert result["goodput"] == {"requests_per_second": 1 / result["duration"], "share": 0.5}
        strict = ServiceLevel(first_token_seconds=1e9, latency_factor=0.99)
        assert replay(PLAIN, limits=SchedulerLimits(service_level=strict))[0]["goodput"]["share"] == 0
        exact = ServiceLevel(first_token_seconds=1e9, latency_factor=1.0)
        result, _ = replay(PLAIN, limits=SchedulerLimits(service_level=exact))
        assert result["goodput"]["requests_per_second"] == 1 / alone

    def test_poisson(self) -> None:
        times = poisson(4000, 8.0, 3)
        assert times == poisson(4000, 8.0, 3) != poisson(4000, 8.0, 4)
        assert times[0] == 0 and times == sorted(times)
        assert times[1] == 0.07449641005025713
        gaps = np.diff(times)
        assert gaps.mean() == pytest.approx(1 / 8, rel=0.05) and gaps.std() == pytest.approx(1 / 8, rel=0.1)

    def test_orders(self, trees_file: Path) -> None:
        first = plan_workload(str(trees_file), requests=10, seed=1)
        assert first.order == plan_workload(str(trees_file), requests=10, seed=1).order
        assert sorted(first.order[:4]) == sorted(first.order[4:8]) == [0, 1, 2, 3]
        assert len(plan_workload(str(trees_file))) == 4 and len(plan_workload(str(trees_file), concurrency=3)) == 12
        assert first.name == "some"

    def test_the_same_options_give_the_same_result(self, trees_file: Path) -> None:
        def once() -> str:
            workload = plan_workload(str(trees_file), requests=30, requests_per_second=2e-4, seed=5)
            return json.dumps(ReplayBench(workload, UNIT, kv_blocks=40, block_size=4).run())

        assert once() == once()


class TestBooks:
    @pytest.mark.parametrize("blocks", [1000, 31])
    def test_never_says_the_same(self, blocks: int) -> None:
        order = [index % 4 for index in range(24)]
        always, never = (
            replay(MIXED, order=order, concurrency=8, limits=SchedulerLimits(fork_policy=policy), kv_blocks=blocks)[0]
            for policy in POLICIES
        )
        assert always["tokens"] == never["tokens"] == sum(text_tokens(MIXED[i]) for i in order)
        assert never["forks"] == 0 and always["forks"] == sum(forks(MIXED[i]) for i in order)
        assert never["request_steps"] == never["tokens"] + len(order)
        assert always["request_steps"] < never["request_steps"]
        assert never["blocks_saved"] == {"peak": 0, "mean": 0.0}
        assert never["kv_tokens_read"] == never["kv_tokens_of_rows"]
        assert always["kv_tokens_read"] < always["kv_tokens_of_rows"]
        for result in (always, never):
            assert result["peak_blocks"] <= blocks and result["mean_blocks"] <= result["peak_blocks"]
            assert (result["preemptions"] > 0) == (blocks == 31)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_host_blocks_take_the_place_of_computing_again(self, policy: ForkPolicy) -> None:
        """The executor checks every path that comes back."""
        order = [index % 4 for index in range(24)]
        limits = SchedulerLimits(fork_policy=policy)
        without, kept, ample = (
            replay(MIXED, order=order, concurrency=8, limits=limits, kv_blocks=blocks, host_blocks=host)[0]
            for blocks, host in ((31, 0), (31, 200), (1000, 0))
        )
        assert ample["tokens_recomputed"] == ample["preemptions"] == without["blocks_swapped_out"] == 0
        assert without["tokens"] == kept["tokens"] and without["request_steps"] == kept["request_steps"]
        assert kept["preemptions"] > 0 and 0 < kept["blocks_swapped_in"] <= kept["blocks_swapped_out"]
        assert kept["tokens_recomputed"] < without["tokens_recomputed"] / 2

    def test_prompts_that_come_again(self) -> None:
        order = [0, 1, 2, 3] * 3
        found = [
            replay(MIXED, order=order, kv_blocks=31, host_blocks=host, same_prompts=True)[0]["tokens_cached"]
            for host in (0, 100)
        ]
        full = sum((tree["prompt_tokens"] - 1) // 4 * 4 for tree in MIXED)
        assert found[0] < found[1] == 2 * full
        assert replay(MIXED, order=order, kv_blocks=31, host_blocks=100)[0]["tokens_cached"] == 0

    def test_blocks_by_hand(self) -> None:
        result, bench = replay(FORKING)
        records = bench.executor.records
        assert [record.blocks for record in records[:7]] == [5, 6, 6, 6, 6, 7, 7]
        # Birth: 27 and 28 tokens take 7 blocks each, 6 of them shared, and the seventh was copied.
        assert (records[7].blocks, records[7].listed) == (8, 14)
        # The child alone, with the path of 37 tokens that computes its EOS.
        assert (records[-1].blocks, records[-1].listed) == (10, 10)
        assert result["blocks_saved"]["peak"] == 6 and result["peak_blocks"] == max(record.blocks for record in records)
        weights = [record.seconds for record in records]
        assert result["mean_blocks"] == pytest.approx(np.average([r.blocks for r in records], weights=weights))


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{}", "no list of trees"),
            ("[]", "holds no trees"),
            ("[1", "cannot be read"),
            ('[{"prompt_tokens": 20}]', "tree 0 is not of the form"),
            ('[{"prompt_tokens": 20, "segments": [[1, 2, 3]]}]', "tree 0 is not of the form"),
            ('[{"prompt_tokens": 20, "segments": [[1.5, 2]]}]', "whole numbers"),
            ('[{"prompt_tokens": 20, "segments": [[0, 2]]}]', "main_tokens >= 1"),
            ('[{"prompt_tokens": 20, "segments": []}]', "main_tokens >= 1"),
            ('[{"prompt_tokens": 1, "segments": [[3, 2]]}]', "prompt takes at least"),
            ("[7]", "tree 0 is not of the form"),
        ],
    )
    def test_trees(self, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "trees.json"
        path.write_text(content)
        with pytest.raises(AparError, match=message.replace("[", r"\[")):
            ReplayBench(plan_workload(str(path)), UNIT)
        assert main(["bench", "replay", "--trees", str(path), "-q"]) in (1, 2)
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "is a JSON object"),
            ("{", "cannot be read"),
            ('{"weights": 3}', "has no weights"),
            ('{"weight_bytes": "many"}', "weight_bytes is 'many', it must be a number of at least 0"),
            ('{"memory_bytes_per_second": 0}', "at least 1"),
            ('{"overhead_seconds": NaN}', "overhead_seconds is nan"),
            ('{"kv_pool_tokens": 5.5}', "whole number"),
            ('{"shared_prefix_reads": 1}', "true or false"),
            (json.dumps(dict.fromkeys(MAY_BE_ZERO, 0)), "steps take no time; one of overhead_seconds"),
        ],
    )
    def test_cost_models(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "model.json"
        path.write_text(content)
        with pytest.raises(RequestError, match=message):
            load_cost_model(str(path))

    def test_a_cost_model_of_ones_own(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.json"
        path.write_text('{"weight_bytes": 5, "kv_pool_tokens": 100}')
        assert load_cost_model(str(path)) == CostModel(name="mine", weight_bytes=5, kv_pool_tokens=100)
        assert load_cost_model("7b-h200") == CostModel()
        with pytest.raises(RequestError, match="no cost model '13b'"):
            load_cost_model("13b")

    def test_options(self, trees_file: Path) -> None:
        source = str(trees_file)
        for options in (
            {"requests_per_second": 1.0, "concurrency": 2},
            {"requests_per_second": 0.0},
            {"requests": 0},
            {"concurrency": 0},
        ):
            with pytest.raises(RequestError):
                plan_workload(source, **options)
        workload = plan_workload(source)
        for bench in ({"kv_blocks": 3}, {"block_size": 0}):
            with pytest.raises(RequestError):
                ReplayBench(workload, UNIT, **bench)
        with pytest.raises(RequestError, match="service level"):
            ServiceLevel(0.0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--host-blocks", "-1"], "at least 0"),
            (["--kv-blocks", "2"], "do not hold the longest answer"),
            (["--requests-per-second", "0"], "is not above 0"),
            (["--requests-per-second", "x"], "is not a number"),
            (["--requests-per-second", "1", "--concurrency", "1"], "not allowed with"),
            (["--fork-policy", "maybe"], "invalid choice"),
            (["--slo-latency", "0"], "is not above 0"),
            (["--cost-model", "no-such"], "no cost model"),
            (["--max-rows", "8", "--max-step-tokens", "4"], "at least twice max_rows"),
        ],
    )
    def test_wrong_usage_is_2(
        self, arguments: list[str], message: str, trees_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["bench", "replay", "--trees", str(trees_file), *arguments]) == 2
        assert message in capsys.readouterr().err


class TestCommand:
    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "replay", "--help"]) == 0
        assert "it does not measure a GPU" in " ".join(capsys.readouterr().out.split())

    def test_json_and_table(self, trees_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["bench", "replay", "--trees", str(trees_file), "--requests", "9", "--fork-policy", "never"]
        assert main([*arguments, "--requests-per-second", "30", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["requests"] == 9 and result["forks"] == 0
        assert result["settings"]["requests_per_second"] == 30 and result["settings"]["concurrency"] is None
        assert result["settings"]["cost_model"]["name"] == "7b-h200"
        assert main([*arguments, "--concurrency", "3"]) == 0
        out = capsys.readouterr().out
        assert "swapped" not in out and "computed again" not in out
        assert main([*arguments, "--host-blocks", "50", "--same-prompts"]) == 0
        more = capsys.readouterr().out
        assert "over 50 host blocks" in more and "found in the cache" in more and "computed again" in more
        assert "9 replies of some, 3 in flight, fork policy never" in out and "within the service level" in out


def fields(model: CostModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__slots__}
