"""Speculation: whatever is drafted, requests say what they say without drafts, to the last token of every limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from drafting import RandomDrafter, random_tree, run_planned, speculate
from path_executor import CHILD, EOS, FORK, VOCAB, PathExecutor, count_branches, reference_tree, scores, shape

from apar.runtime.branch import Request
from apar.runtime.engine import Engine
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.speculative.typical import typical_token

CONTEXT = 64
CHAIN = DraftTree([(0,) * depth for depth in range(1, 7)])


def make_engine(
    block_size: int = 4, blocks: int = 400, rows: int = 40, tokens: int = 400, caching: bool = True
) -> Engine:
    limits = SchedulerLimits(
        max_rows=rows, max_step_tokens=tokens, max_live_branches=4 * rows + 40, prefix_caching=caching
    )
    return Engine(PathExecutor(blocks, block_size, CONTEXT), limits)


def drafting(engine: Engine, tree: DraftTree, chance: float = 1.0, seed: int = 0, **options: Any) -> RandomDrafter:
    drafter = RandomDrafter(engine.scheduler.table, tree, chance, seed)
    speculate(engine, drafter, **options)
    return drafter


def run(engine: Engine) -> int:
    """Step to the end with the books checked; returns how many steps it took."""
    steps = 0
    while engine.step() is not None:
        engine.scheduler.check()
        steps += 1
        assert steps < 10_000
    assert engine.cache.num_referenced == 0
    return steps


def said(request: Request) -> tuple[object, ...]:
    """All that a request said, however its branches are numbered."""
    logprobs = sorted([entry.token_id for entry in b.logprobs] if b.logprobs else [] for b in request.branches)
    return shape(request.root), request.sampled, request.finish_reason, logprobs


def forking_prompt(params: SamplingParams, least: int = 4) -> list[int]:
    """A prompt whose answer has at least so many branches, and not too many for a step."""
    random = np.random.default_rng(5)
    while True:
        prompt = random.integers(3, 20, size=6).tolist()
        if least <= count_branches(reference_tree(prompt, params, CONTEXT)) <= 30:
            return prompt


# ---------------------------------------------------------------------------------------------------- equality


def some_params(random: np.random.Generator) -> SamplingParams:
    """Parameters with any of the limits, bans and rules that drafts have to respect."""
    chosen: dict[str, Any] = {"temperature": 0.0}
    if random.random() < 0.5:
        chosen |= {"temperature": 0.5, "seed": int(random.integers(1000))}
    for name, value, chance in (
        ("min_tokens", 1, 0.3),
        ("repetition_penalty", 1.2, 0.2),
        ("bad_words_ids", ((5, 6), (7,)), 0.2),
        ("stop_token_ids", (9,), 0.2),
        ("logit_bias", {8: 0.5, FORK: 0.2}, 0.2),
        ("logprobs", 1, 0.2),
        ("ignore_eos", True, 0.2),
        ("top_p", 0.8, 0.2),
    ):
        if random.random() < chance:
            chosen[name] = value
    return SamplingParams(
        max_tokens=int(random.integers(1, 150)),
        max_depth=int(random.integers(1, 4)),
        max_branch_tokens=int(random.integers(1, 40)),
        max_branches=int(random.choice([1, 2, 3, 4, 6, 32])),
        **chosen,
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_of_drafts_change_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    block_size = int(random.choice([1, 2, 4, 8]))
    blocks = CONTEXT // block_size + int(random.integers(60, 400))
    sizes = {"tokens": 85 + int(random.integers(100)), "caching": bool(random.integers(2))}
    tree = random_tree(random, int(random.integers(1, 40)))
    jobs = [
        (random.integers(3, 20, size=int(random.integers(1, 20))).tolist(), some_params(random))
        for _ in range(int(random.integers(1, 6)))
    ]
    chance, budget = float(random.choice([0.3, 0.8, 1.0])), int(random.integers(4, 300))
    answers = []
    for drafts in (False, True):
        engine = make_engine(block_size, blocks, **sizes)
        if drafts:
            drafting(engine, tree, chance, seed, step_tokens=budget, adaptive=bool(seed % 2))
        requests = [engine.submit(f"r{i}", prompt, params) for i, (prompt, params) in enumerate(jobs)]
        run(engine)
        answers.append([said(request) for request in requests])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("max_branches", [3, 32])
def test_every_token_limit_falls_on_the_same_token(max_branches: int) -> None:
    """`max_tokens` counts over the whole tree: branches that run ahead must not take the others' tokens."""
    wide = SamplingParams(max_tokens=10_000, max_branch_tokens=24, temperature=0.0)
    prompt = forking_prompt(wide)
    plain, drafted = make_engine(), make_engine()
    drafting(drafted, CHAIN, chance=0.7, step_tokens=300)
    for max_tokens in range(1, 90, 2):
        params = SamplingParams(max_tokens=max_tokens, max_branches=max_branches, max_branch_tokens=24, temperature=0.0)
        pair = [engine.submit(f"r{max_tokens}", prompt, params) for engine in (plain, drafted)]
        run(plain)
        run(drafted)
        assert said(pair[0]) == said(pair[1])
        assert pair[1].sampled <= max_tokens
    assert drafted.scheduler.speculation is not None and drafted.scheduler.speculation.accepted > 100


def test_right_drafts_save_steps() -> None:
    params = SamplingParams(max_tokens=10_000, max_branch_tokens=24, temperature=0.0)
    prompt = forking_prompt(params)
    engines = [make_engine() for _ in range(3)]
    drafting(engines[1], CHAIN, chance=1.0, step_tokens=400)
    drafting(engines[2], CHAIN, chance=0.0, step_tokens=400)
    steps = []
    for engine in engines:
        request = engine.submit("r", prompt, params)
        run(engine)
        steps.append(request.steps)
    assert steps[1] < 0.5 * steps[0]
    assert steps[2] <= steps[0], "wrong drafts cost no step"


def test_fork_inside_a_speculated_chunk() -> None:
    """A chunk is cut at [Fork]: the parent goes on behind it in the next step, beside a child that drafts already."""
    params = SamplingParams(max_tokens=10_000, max_branch_tokens=24, temperature=0.0)
    prompt = forking_prompt(params)
    engine = make_engine(block_size=4)
    drafter = drafting(engine, CHAIN, step_tokens=400)
    drafter.available = lambda slots: np.full(slots.size, CHAIN.size, np.int32)  # type: ignore[method-assign]
    request = engine.submit("r", prompt, params)
    engine.step()
    cut, children_drafted = 0, 0
    while True:
        step = engine.scheduler.schedule()
        if step is None:
            break
        drafts, table = step.drafts, engine.scheduler.table
        assert drafts is not None
        newborn = [b for b in request.live if table.length[b.slot] == b.start]
        for branch in newborn:
            row = step.rows.tolist().index(branch.slot)
            assert step.pending[row] == 2 and step.inputs.input_ids[step.inputs.query_start[row]] == FORK
            assert step.inputs.input_ids[step.inputs.query_start[row] + 1] == CHILD
            children_drafted += int(drafts.sizes[row] > 0)
        ends = np.cumsum(drafts.sizes)
        chunks = [drafts.tokens[end - size : end].tolist() for end, size in zip(ends, drafts.sizes, strict=True)]
        behind = {b: c.index(FORK) for b, c in zip(step.rows.tolist(), chunks, strict=True) if FORK in c[:-1]}
        forks, branches = engine.scheduler.forks, {b.slot: b for b in request.live}
        run_planned(engine, step)
        engine.scheduler.check()
        for slot in behind:
            branch = branches[slot]
            if engine.scheduler.forks > forks and branch.slot >= 0 and branch.forks:
                last = branch.forks[-1]
                if last == table.length[slot] - 1:
                    cut += 1
                    assert table.tokens[slot, last] == FORK, "[Fork] is the last token of the step"
                    assert table.computed[slot] == last, "its keys and values are computed in the next step"
    assert cut >= 2 and children_drafted >= 2
    assert shape(request.root) == shape(reference_tree(prompt, params, CONTEXT))
    assert engine.cache.num_referenced == 0


def test_a_branch_that_ends_inside_a_draft_says_nothing_more() -> None:
    params = SamplingParams(max_tokens=10_000, max_branch_tokens=40, max_depth=1, temperature=0.0)
    random, ended = np.random.default_rng(0), 0
    engine = make_engine()
    drafting(engine, CHAIN, step_tokens=400)
    for i in range(20):
        prompt = random.integers(3, 20, size=5).tolist()
        request = engine.submit(f"r{i}", prompt, params)
        run(engine)
        assert shape(request.root) == shape(reference_tree(prompt, params, CONTEXT))
        ended += request.root.finish_reason == "stop"
    assert ended > 5


def test_the_context_may_end_inside_a_draft() -> None:
    params = SamplingParams(max_tokens=10_000, ignore_eos=True, fork=False, temperature=0.0)
    for length in range(CONTEXT - 14, CONTEXT):
        plain, drafted = make_engine(), make_engine()
        drafting(drafted, random_tree(np.random.default_rng(length), 30), step_tokens=400)
        prompt = np.random.default_rng(length).integers(3, 20, size=length).tolist()
        pair = [engine.submit("r", prompt, params) for engine in (plain, drafted)]
        run(plain)
        run(drafted)
        assert said(pair[0]) == said(pair[1])
        assert len(prompt) + len(pair[1].root.tokens) == CONTEXT


def test_small_pools_preempt_and_still_say_the_same() -> None:
    params = SamplingParams(max_tokens=10_000, max_branch_tokens=24, temperature=0.0)
    preemptions = 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        engine = make_engine(block_size=2, blocks=40 + 4 * seed)
        drafting(engine, random_tree(random, 20), 0.8, seed, step_tokens=100)
        jobs = []
        for i in range(5):
            prompt = random.integers(3, 20, size=6).tolist()
            jobs.append((engine.submit(f"r{i}", prompt, params), prompt))
        run(engine)
        preemptions += engine.scheduler.preemptions
        for request, prompt in jobs:
            assert shape(request.root) == shape(reference_tree(prompt, params, engine.scheduler.max_context))
    assert preemptions > 5


def test_a_step_that_fails_takes_only_its_requests() -> None:
    params = SamplingParams(max_tokens=10_000, max_branch_tokens=24, temperature=0.0)
    engine = make_engine(block_size=2)
    drafting(engine, random_tree(np.random.default_rng(3), 30), 0.9, step_tokens=400)
    prompt = forking_prompt(params)
    first = engine.submit("first", prompt, params)
    for _ in range(4):
        engine.step()
    engine.executor.fail_next = True  # type: ignore[attr-defined]
    engine.step()
    engine.scheduler.check()
    assert first.finish_reason == "error" and engine.scheduler.idle
    second = engine.submit("second", prompt, params)
    run(engine)
    assert shape(second.root) == shape(reference_tree(prompt, params, CONTEXT))


def test_a_drafter_that_fails_ends_the_step_s_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=50, temperature=0.0, fork=False, ignore_eos=True)
    engine = make_engine()
    drafter = drafting(engine, CHAIN)
    first = engine.submit("first", [5, 6, 7], params)
    engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError("the heads failed")

    with monkeypatch.context() as patch:
        patch.setattr(drafter, "learn", fail)
        report = engine.step()
    assert report is not None and report.finished == [first]
    assert first.finish_reason == "error" and "the heads failed" in (first.error or "")
    engine.scheduler.check()
    second = engine.submit("second", [5, 6, 7], params)
    run(engine)
    assert second.sampled == 50


def test_a_reader_ends_a_branch_between_two_tokens_of_a_draft() -> None:
    """What stop strings do: nothing of the draft behind them is booked."""
    params = SamplingParams(max_tokens=60, temperature=0.0, fork=False, ignore_eos=True)
    engine = make_engine()
    drafter = drafting(engine, CHAIN, step_tokens=400)
    drafter.available = lambda slots: np.full(slots.size, CHAIN.size, np.int32)  # type: ignore[method-assign]
    request = engine.submit("r", [5, 6, 7], params)
    seen: list[int] = []

    def read(report: Any) -> None:
        for branch, token in zip(report.branches, report.tokens, strict=True):
            seen.append(token)
            if len(seen) == 17:
                engine.scheduler.finish_branch(branch, "stop_string")

    steps = 0
    while engine.step(read) is not None:
        steps += 1
    assert request.root.tokens == seen and len(seen) == 17 == request.sampled
    assert steps <= 10 and request.finish_reason == "stop_string"
    assert engine.cache.num_referenced == 0


# ---------------------------------------------------------------------------------------------------- sampling


def chi_square_limit(degrees: int) -> float:
    """The value that chance exceeds once in ten thousand (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * degrees)
    return float(degrees * (1 - part + 3.719 * part**0.5) ** 3)


def exact_pairs(prompt: Sequence[int], temperature: float) -> dict[tuple[int, int], float]:
    """Probability of each pair of first tokens, by the definition of sampling."""

    def chances(path: Sequence[int]) -> np.ndarray[Any, Any]:
        values = scores(tuple(path)).astype(np.float64)
        values[[CHILD, FORK]] = -np.inf
        values[EOS] = -np.inf
        weights = np.exp((values - values.max()) / temperature)
        return np.asarray(weights / weights.sum())

    first = chances(prompt)
    return {
        (a, b): float(first[a] * p) for a in range(VOCAB) if first[a] for b, p in enumerate(chances([*prompt, a])) if p
    }


def sample_pairs(acceptance: str, prompt: list[int], temperature: float, count: int) -> Counter[tuple[int, int]]:
    engine = make_engine(blocks=2000, rows=200, tokens=2000)
    tree = DraftTree([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
    drafter = drafting(engine, tree, step_tokens=2000, acceptance=acceptance)
    drafter.available = lambda slots: np.full(slots.size, tree.size, np.int32)  # type: ignore[method-assign]
    found: Counter[tuple[int, int]] = Counter()
    requests = [
        engine.submit(
            f"r{i}",
            prompt,
            SamplingParams(max_tokens=5, fork=False, ignore_eos=True, temperature=temperature, seed=i),
        )
        for i in range(count)
    ]
    run(engine)
    speculation = engine.scheduler.speculation
    assert speculation is not None and speculation.accepted > 0.5 * count
    for request in requests:
        # The first token is sampled behind the prompt, without a draft; the others are what drafts were made for.
        found[tuple(request.root.tokens[1:3])] += 1  # type: ignore[index]
    return found


def chi_square(found: Counter[tuple[int, int]], chances: dict[tuple[int, int], float], count: int) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; rare pairs are taken together."""
    likely = [pair for pair, chance in chances.items() if chance * count >= 8]
    expected = np.array([chances[pair] * count for pair in likely])
    observed = np.array([found[pair] for pair in likely])
    expected, observed = np.append(expected, count - expected.sum()), np.append(observed, count - observed.sum())
    return float(((observed - expected) ** 2 / expected).sum()), len(likely)


def test_drafts_leave_the_distribution_as_it_is() -> None:
    """The tokens that drafts were verified for, against the model's own distribution."""
    prompt, temperature, count = [5, 9, 4], 0.12, 2500
    first = exact_pairs(prompt, temperature)
    chances: dict[tuple[int, int], float] = {}
    for token in {a for a, _ in first}:
        share = sum(chance for (a, _), chance in first.items() if a == token)
        for pair, chance in exact_pairs([*prompt, token], temperature).items():
            chances[pair] = chances.get(pair, 0.0) + share * chance
    found = sample_pairs("exact", prompt, temperature, count)
    statistic, degrees = chi_square(found, chances, count)
    assert degrees > 20
    assert statistic < chi_square_limit(degrees)
    # The test can tell: typical acceptance, on the same drafts, is another distribution.
    other, _ = chi_square(sample_pairs("typical", prompt, temperature, count), chances, count)
    assert other > 3 * chi_square_limit(degrees)


def test_a_seed_says_the_same_with_drafts_and_without() -> None:
    params = [SamplingParams(max_tokens=40, temperature=0.4, top_p=0.9, seed=seed) for seed in range(30)]
    answers = []
    for chance in (None, 0.5, 1.0):
        engine = make_engine(blocks=900, rows=100)
        if chance is not None:
            drafting(engine, random_tree(np.random.default_rng(1), 30), chance, step_tokens=300)
        requests = [engine.submit(f"r{i}", [4, 8, 15], own) for i, own in enumerate(params)]
        run(engine)
        answers.append([said(request) for request in requests])
    assert answers[0] == answers[1] == answers[2]


def test_typical_acceptance_keeps_bans_and_limits() -> None:
    engine = make_engine()
    drafter = drafting(engine, CHAIN, 0.3, step_tokens=300, acceptance="typical", posterior_threshold=0.01)
    drafter.available = lambda slots: np.full(slots.size, CHAIN.size, np.int32)  # type: ignore[method-assign]
    requests = [
        engine.submit(
            f"r{i}",
            [3, 4, 5],
            SamplingParams(max_tokens=30, temperature=1.0, seed=i, bad_words_ids=((7,), (8, 9)), min_tokens=5),
        )
        for i in range(40)
    ]
    run(engine)
    for request in requests:
        for branch in request.branches:
            assert 7 not in branch.tokens and CHILD not in branch.tokens
            assert (8, 9) not in set(zip(branch.tokens, branch.tokens[1:], strict=False))
        assert request.sampled <= 30
        assert len(request.root.tokens) >= 5


def test_typical_token_by_hand() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    guesses = np.array([3, 2], np.int32)

    def chosen(guesses: list[int], **params: Any) -> int | None:
        own = SamplingParams(**{"temperature": 1.0, **params})
        return typical_token(logits, np.array(guesses, np.int32), own, 0.09, 0.3)

    # Entropy is 1.14: 0.3 * exp(-1.14) = 0.096, so the threshold is 0.09.
    assert chosen([3, 2]) == 2 and chosen([3]) is None and chosen([2, 1]) == 1
    assert chosen([2], top_k=2) is None and chosen([1], top_k=2) == 1
    assert chosen([2], top_p=0.7) is None and chosen([1], top_p=0.7) == 1
    assert chosen([2], min_p=0.5) is None
    assert guesses.tolist() == [3, 2]


def test_counters_add_up() -> None:
    engine = make_engine()
    drafting(engine, CHAIN, 0.8)
    request = engine.submit("r", [5, 6, 7], SamplingParams(max_tokens=60, fork=False, ignore_eos=True, temperature=0.0))
    run(engine)
    speculation = engine.scheduler.speculation
    assert speculation is not None
    lengths = speculation.lengths
    assert int((lengths * np.arange(lengths.size)).sum()) == speculation.accepted
    assert request.sampled == request.steps + speculation.accepted
    assert speculation.accepted <= speculation.drafted == engine.scheduler.load()["draft_tokens"]
    assert engine.scheduler.load()["accepted_draft_tokens"] == speculation.accepted
