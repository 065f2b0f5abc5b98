"""The parts of speculation: trees and their masks, the budget, prompt lookup, options; and both drafters on the tiny
model, whose answers must be those of plain decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_heads
from drafting import random_tree, run_planned

from apar.export.errors import ExecutorError, RequestError
from apar.export.onnx_engine import build
from apar.runtime.cli import main, serve
from apar.runtime.cli.engine_options import scheduler_limits
from apar.runtime.engine import Engine
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.executor.tree_mask import visible
from apar.runtime.limits import SchedulerLimits
from apar.runtime.llm import LLM
from apar.runtime.outputs import DeltaEvent, RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.engine.settings import parse_settings
from apar.runtime.speculative.budget import DraftBudget
from apar.runtime.speculative.lookup import LookupIndex
from apar.runtime.speculative.medusa import MedusaDrafter
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.speculative.tree import DraftTree, causal_masks

GREEDY = SamplingParams(max_tokens=400, temperature=0.0)
DRAFTS = [DraftOptions("medusa", measured=False), DraftOptions("ngram", measured=False)]
"""The same drafts on every machine."""
NAMES = ["medusa", "ngram"]
UNCACHED = SchedulerLimits(prefix_caching=False)


# ----------------------------------------------------------------------------------------------------- trees


def test_the_default_tree_is_the_papers() -> None:
    tree = DraftTree(DraftOptions("medusa").paths())
    assert tree.size == 7 + 7 * 6, "50 nodes with the row's own token"
    assert tree.max_depth == 2 and tree.max_rank == 6
    assert np.bincount(tree.depth).tolist() == [0, 7, 42]
    assert tree.rank[0] == 0 and tree.parent[0] == -1


@pytest.mark.parametrize("seed", range(10))
def test_every_prefix_of_a_tree_is_a_tree(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = random_tree(random, 60, width=4, depth=5)
    assert (tree.parent < np.arange(tree.size)).all()
    assert (tree.depth == np.where(tree.parent < 0, 1, tree.depth[tree.parent] + 1)).all()
    assert (np.diff(tree.share) <= 0).all(), "the likeliest come first"
    for depth in range(tree.max_depth + 1):
        prefix = tree.depth[: tree.upto_depth[depth]]
        assert (prefix <= depth).all()
        assert tree.upto_depth[depth] == tree.size or tree.depth[tree.upto_depth[depth]] > depth


@pytest.mark.parametrize("pending", [1, 2, 31, 40])
def test_masks_are_the_pending_tokens_the_ancestors_and_the_node(pending: int) -> None:
    tree = random_tree(np.random.default_rng(pending), 70)
    seen = visible(tree.masks(pending), pending + tree.size)
    for node in range(tree.size):
        wanted, at = set(range(pending)), node
        while at >= 0:
            wanted.add(pending + at)
            at = int(tree.parent[at])
        assert set(np.flatnonzero(seen[node]).tolist()) == wanted
    causal = visible(causal_masks(np.arange(70, dtype=np.int32), 3), 70)
    assert (causal == np.tri(70, dtype=bool)).all()


def test_trees_by_configuration() -> None:
    choices = DraftOptions("medusa", medusa_choices=[[0, 0, 0], [1, 2]]).paths()
    assert sorted(choices) == [(0,), (0, 0), (0, 0, 0), (1,), (1, 2)], "ancestors are added"
    assert len(DraftOptions("medusa", medusa_widths=(1, 2, 2, 2)).paths()) == 2 + 4 + 8
    deeper = set(DraftOptions("medusa").paths(heads=4)) - set(DraftOptions("medusa").paths())
    assert deeper == {(0, 0, 0), (0, 0, 0, 0)}, "a chain for the heads that the paper's tree leaves out"
    assert DraftOptions("medusa", medusa_widths=(1, 7, 6)).paths(heads=4) == DraftOptions("medusa").paths()
    assert DraftOptions("ngram", num_speculative_tokens=3).paths() == [(0,), (0, 0), (0, 0, 0)]
    assert DraftTree(DraftOptions("medusa").paths(), 10).size == 10


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "eagle"}, "one of none, medusa, ngram"),
        ({"method": "medusa", "medusa_widths": (2, 7)}, "begin with 1"),
        ({"method": "medusa", "medusa_widths": (1,)}, "begin with 1"),
        ({"method": "medusa", "medusa_widths": (1, 20, 20)}, "more than 256"),
        ({"method": "medusa", "medusa_choices": []}, "1 to 256 nodes"),
        ({"method": "medusa", "medusa_choices": [[-1]]}, "a rank in medusa_choices"),
        ({"method": "medusa", "medusa_choices": [[]]}, "1 to 16 ranks"),
        ({"method": "medusa", "medusa_choices": [0]}, "a path of medusa_choices is 0, it must be a list"),
        ({"medusa_widths": 7}, "medusa_widths is 7, it must be a list"),
        ({"adaptive": "no"}, "true or false"),
        ({"measured": 1}, "true or false"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"draft_budget": True}, "draft_budget"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min"),
        ({"acceptance": "lenient"}, "exact, typical"),
        ({"posterior_alpha": 0}, "posterior_alpha"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        DraftOptions(**options)


# ---------------------------------------------------------------------------------------------------- budget


def sizes_of(skills: list[float], budget: int, limits: list[int] | None = None, **options: Any) -> list[int]:
    tree = DraftTree(DraftOptions("medusa").paths())
    rule = DraftBudget(tree, options.pop("adaptive", True), capacity=len(skills))
    rule.skill[:] = skills
    most = np.array(limits or [tree.size] * len(skills), np.int32)
    return rule.sizes(np.arange(len(skills)), most, budget).tolist()


def test_rows_share_the_budget() -> None:
    alone, sure = sizes_of([0.6], 64), sizes_of([0.99], 64)
    assert 15 <= alone[0] < sure[0] <= 49, "nodes that are never accepted are not drafted, however much room there is"
    sizes = [sizes_of([0.6] * rows, 64) for rows in (1, 2, 4, 8, 16, 64)]
    assert all(sum(each) <= 64 for each in sizes)
    assert [max(each) for each in sizes] == sorted((max(each) for each in sizes), reverse=True)
    assert sizes[3] == [8] * 8 and sizes[5] == [1] * 64
    assert sizes_of([0.6] * 100, 64) == [1] * 64 + [0] * 36
    assert sizes_of([0.6] * 4, 0) == [0] * 4


def test_the_budget_goes_where_drafts_are_accepted() -> None:
    good, bad = sizes_of([0.95, 0.15], 16)
    assert good > 3 * bad > 0
    assert good + bad == 16
    even = sizes_of([0.95, 0.95, 0.95], 30)
    assert max(even) - min(even) <= 1 and sum(even) == 30


def test_limits_hold_and_what_a_row_leaves_goes_to_others() -> None:
    assert sizes_of([0.6, 0.6], 20, limits=[3, 49]) == [3, 17]
    assert sizes_of([0.6, 0.6], 20, limits=[0, 2]) == [0, 2]
    assert sizes_of([0.6] * 3, 10, limits=[6, 6, 6], adaptive=False) == [6, 4, 0]


def test_the_rule_is_a_function_of_its_inputs() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        skills = random.random(int(random.integers(1, 40))).tolist()
        budget = int(random.integers(0, 200))
        limits = random.integers(0, 50, size=len(skills)).tolist()
        first = sizes_of(skills, budget, limits)
        assert first == sizes_of(skills, budget, limits)
        assert sum(first) <= budget and all(size <= limit for size, limit in zip(first, limits, strict=True))


def test_skill_follows_what_is_accepted() -> None:
    rule = DraftBudget(DraftTree([(0,)]), True, capacity=3)
    slots = np.array([0, 1])
    for _ in range(40):
        rule.learn(slots, np.array([True, False]))
    assert rule.skill[0] > 0.95 and rule.skill[1] < 0.05
    assert rule.sizes(slots, np.array([1, 1], np.int32), 2).tolist() == [1, 1], "a little is always tried"
    rule.inherit(2, 0)
    assert rule.skill[2] == rule.skill[0]
    rule.begin(slots)
    assert rule.skill[0] == rule.skill[1] < 0.95


# ---------------------------------------------------------------------------------------------------- lookup


def test_lookup_finds_what_followed_the_longest_run_last() -> None:
    index = LookupIndex([1, 2, 3, 4, 9, 2, 3, 7, 8], 1, 3)
    assert index.follow(0, 3) == [], "8 stood nowhere before"
    index.append(0, 2)
    assert index.follow(0, 3) == [3, 7, 8], "the last time that 2 was said"
    index.append(0, 3)
    index.append(0, 4)
    assert index.follow(0, 2) == [9, 2], "(2, 3, 4) stood at the beginning"


def test_lookup_is_shared_by_branches() -> None:
    index = LookupIndex([5, 6], 2, 4)
    for token in (10, 20):
        index.append(0, token)
    index.begin(1, [5, 6, 10, 20])
    for token in (30, 31, 32, 33):
        index.append(1, token)
    index.begin(2, [5, 6, 10, 20])
    assert index.follow(2, 8) == [30, 31, 32, 33], "a child begins as its sibling did"
    index.append(2, 30)
    index.append(2, 31)
    assert index.follow(2, 8) == [32, 33]
    index.end(1)
    assert index.follow(2, 8) == [32, 33], "what an ended branch said stays"
    assert index.follow(1, 8) == []


def test_lookup_memory_is_bounded() -> None:
    index = LookupIndex(range(100, 10_000), 2, 4, max_entries=50)
    assert len(index) <= 50
    index.append(0, 9_997)
    index.append(0, 9_998)
    assert index.follow(0, 1) == [9_999], "the newest are kept"
    index.append(0, 100)
    index.append(0, 101)
    assert index.follow(0, 1) == [], "the oldest are forgotten"


# -------------------------------------------------------------------------------------- drafters on real engines


def answers(engine: Path, prompts: list[Any], draft: DraftOptions | str | None, **options: Any) -> list[RequestOutput]:
    with LLM(engine, draft=draft, threads=1, **options) as llm:
        return llm.generate(prompts, GREEDY)


def words(outputs: list[RequestOutput]) -> list[Any]:
    return [(o.text, [(b.token_ids, b.finish_reason) for b in o.branches], o.usage.completion_tokens) for o in outputs]


@pytest.fixture(scope="module")
def plain(tiny_engine: Path, heldout: list[dict[str, Any]]) -> Iterator[list[RequestOutput]]:
    """Plain decoding of all prompts of the tiny set, many at a time."""
    yield answers(tiny_engine, [entry["messages"] for entry in heldout], None)


@pytest.mark.parametrize("draft", [*DRAFTS, *NAMES], ids=[*NAMES, "medusa measured", "ngram measured"])
def test_all_prompts_are_answered_as_without_drafts(
    draft: DraftOptions | str, tiny_engine: Path, heldout: list[dict[str, Any]], plain: list[RequestOutput]
) -> None:
    drafted = answers(tiny_engine, [entry["messages"] for entry in heldout], draft)
    assert words(drafted) == words(plain)


def test_deep_trees_and_large_budgets_answer_the_same(
    tiny_engine: Path, heldout: list[dict[str, Any]], plain: list[RequestOutput]
) -> None:
    deep = DraftOptions("medusa", medusa_widths=(1, 3, 2, 2, 1), draft_budget=200)
    drafted = answers(tiny_engine, [entry["messages"] for entry in heldout[::5]], deep)
    assert words(drafted) == words(plain[::5])


def test_forks_and_medusa_take_a_quarter_of_plain_decodings_steps(
    tiny_engine: Path, heldout: list[dict[str, Any]], plain: list[RequestOutput]
) -> None:
    forking = [entry["messages"] for entry, output in zip(heldout, plain, strict=True) if len(output.branches) > 1]
    with LLM(tiny_engine, draft=DRAFTS[0], threads=1, limits=UNCACHED) as llm:
        outputs = [llm.generate(prompt, GREEDY)[0] for prompt in forking[::4]]
        stats, counters = llm.stats(), llm._text.engine.scheduler.counters
    tokens, steps = sum(o.usage.completion_tokens for o in outputs), sum(o.timing.steps for o in outputs)
    assert 4 * steps <= tokens, "plain decoding takes a step a token"
    assert counters.request_steps == steps, "what `adaptive` learns a request's speed from"
    assert counters.tokens == llm._text.metrics.generation_tokens
    assert sum(stats["accepted_lengths"][1:]) > stats["accepted_lengths"][0]


@pytest.mark.parametrize("draft", DRAFTS, ids=NAMES)
@pytest.mark.parametrize("options", [{"executor": "torch"}, {"graph": "portable"}], ids=["torch", "portable"])
def test_other_executors_draft_too(
    draft: DraftOptions,
    options: dict[str, Any],
    tiny_engine: Path,
    heldout: list[dict[str, Any]],
    plain: list[RequestOutput],
) -> None:
    chosen = [0, 40]
    kind = options.get("executor")
    with LLM(tiny_engine, draft=draft, **(options if kind else {**options, "threads": 1})) as llm:
        outputs = llm.generate([heldout[i]["messages"] for i in chosen], GREEDY)
        assert llm.stats()["accepted_draft_tokens"] > 0
    assert words(outputs) == words([plain[i] for i in chosen])


def test_a_child_drafts_from_its_first_step(tiny_engine: Path, heldout: list[dict[str, Any]]) -> None:
    with LLM(tiny_engine, draft=DRAFTS[0], threads=1) as llm:
        engine = llm._text.engine
        speculation = engine.scheduler.speculation
        assert speculation is not None and isinstance(speculation.drafter, MedusaDrafter)
        llm._text.submit(llm._text.encode(heldout[0]["messages"]), GREEDY)
        born = drafted = accepted = 0
        while (step := engine.scheduler.schedule()) is not None:
            table = engine.scheduler.table
            first = table.length[step.rows] == table.start[step.rows]
            children = first & (table.clock_base[step.rows] != table.start[step.rows])
            born += int(children.sum())
            if step.drafts is not None:
                drafted += int((step.drafts.sizes[children] > 0).sum())
            slots, before = step.rows[children], table.length[step.rows[children]]
            run_planned(engine, step)
            accepted += int((table.length[slots] - before > 1).sum())
    assert born == drafted == 6
    assert accepted >= 2


def test_stop_strings_and_streams_end_inside_drafts(tiny_engine: Path) -> None:
    question, stop = "Give me four facts about owls.", ["mice", "hear"]
    params = SamplingParams(max_tokens=300, temperature=0.0, stop=stop)
    found = []
    for draft in (None, DRAFTS[0]):
        with LLM(tiny_engine, draft=draft, threads=1) as llm:
            items = list(llm.stream(question, params))
        output = items[-1]
        assert isinstance(output, RequestOutput)
        deltas: dict[int, str] = {}
        for item in items:
            if isinstance(item, DeltaEvent):
                deltas[item.branch_id] = deltas.get(item.branch_id, "") + item.text
        for branch in output.branches:
            assert deltas.get(branch.branch_id, "") == "".join(branch.segments)
        found.append((words([output]), [branch.segments for branch in output.branches], deltas))
    assert found[0] == found[1]
    assert any(reason == "stop_string" for _, reason in found[0][0][0][1])


def test_sampling_on_the_tiny_model_does_not_depend_on_drafts(tiny_engine: Path) -> None:
    params = [SamplingParams(max_tokens=120, temperature=1.2, top_p=0.95, seed=seed) for seed in range(6)]
    found = []
    for draft in (None, *DRAFTS):
        with LLM(tiny_engine, draft=draft, threads=1) as llm:
            found.append(words(llm.generate(["Tell me about the violin."] * 6, params)))
    assert found[0] == found[1] == found[2]


def test_replayed_trees_are_drafted_by_lookup() -> None:
    tree = {"prompt_tokens": 40, "segments": [[12, 30], [10, 25], [8, 0]]}
    steps = []
    for draft in (None, DRAFTS[1]):
        executor = ReplayExecutor([tree], num_blocks=200)
        engine = Engine(executor, SchedulerLimits(), draft=draft)
        request = engine.submit("r", executor.replay_prompt(0), SamplingParams(max_tokens=500, temperature=0.0))
        while engine.step() is not None:
            engine.scheduler.check()
        assert request.sampled == 12 + 30 + 10 + 25 + 8 + 2 * 2 + 1
        steps.append(request.steps)
    assert steps[1] <= steps[0]


def test_engines_that_cannot_draft_say_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "plain")
    make_heads(tmp_path / "checkpoint" / "medusa", count=1)
    build(tmp_path / "checkpoint", tmp_path / "one")
    with pytest.raises(ExecutorError, match=r"no Medusa heads.*ngram"):
        LLM(tmp_path / "plain", draft="medusa", num_blocks=16)
    with pytest.raises(RequestError, match="2 deep, the engine has 1 Medusa head"):
        LLM(tmp_path / "one", draft="medusa", num_blocks=16)
    with pytest.raises(RequestError, match="draft method is 'eagle'"):
        LLM(tmp_path / "plain", draft="eagle", num_blocks=16)
    with LLM(tmp_path / "one", draft=DraftOptions("medusa", medusa_widths=(1, 3)), num_blocks=16) as llm:
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        assert llm.generate("hello", params, chat=False)[0].usage.completion_tokens == 20


def test_generate_drafts_on_the_command_line(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for draft in ("none", "medusa", "ngram"):
        question = "Give me three facts about owls."
        options = ["--draft", draft, "--draft-budget", "15", "--temperature", "0"]
        assert main(["generate", str(tiny_engine), question, "--json", "-q", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["text"] == found[1]["text"] == found[2]["text"]
    assert found[1]["timing"]["steps"] < 0.6 * found[0]["timing"]["steps"]
    assert main(["generate", str(tiny_engine), "x", "--draft", "medusa", "--medusa-widths", "7,6"]) == 2
    assert "begin with 1" in capsys.readouterr().err


def test_apar_serve_passes_drafts_on_to_the_engine() -> None:
    parser = serve.make_parser()
    options = parser.parse_args(["tiny", "--draft", "medusa", "--medusa-widths", "1,4,3", "--draft-budget", "30"])
    parameters = serve._parameters(options, Path("tiny"), scheduler_limits(options))
    assert parse_settings(parameters).draft == DraftOptions("medusa", medusa_widths=[1, 4, 3], draft_budget=30)
    plain = parser.parse_args(["tiny"])
    assert parse_settings(serve._parameters(plain, Path("tiny"), scheduler_limits(plain))).draft == DraftOptions()
