"""Scheduling with the path executor (whole paths are checked at every step) and with recorded trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pytest
from path_executor import CHILD, EOS, FORK, PathExecutor, PlainBranch, count_branches, reference_tree, shape

from apar.export.errors import CapacityError, RequestError
from apar.runtime.branch import Branch, Request
from apar.runtime.engine import Engine
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams

LIMITS = SchedulerLimits(max_rows=64, max_step_tokens=128, max_live_branches=256)
LONG = SamplingParams(max_tokens=100_000, max_depth=3)


def make(num_blocks: int = 512, block_size: int = 4, context: int = 96, limits: SchedulerLimits = LIMITS) -> Engine:
    return Engine(PathExecutor(num_blocks, block_size, context), limits)


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    head = random.integers(3, 20, size=shared).tolist()
    return [head + random.integers(3, 20, size=int(random.integers(1, 24))).tolist() for _ in range(count)]


def forking_prompt(branches: int, length: int = 3, context: int = 96) -> list[int]:
    """A prompt whose answer has at least so many branches."""
    for prompt in prompts_of(length):
        if count_branches(reference_tree(prompt, LONG, context)) >= branches:
            return prompt
    raise AssertionError("no such prompt")


def prompts_of(length: int) -> Iterable[list[int]]:
    random = np.random.default_rng(length)
    return (random.integers(3, 20, size=length).tolist() for _ in range(10_000))


def run(engine: Engine, requests: Iterable[Request] = ()) -> None:
    engine.scheduler.check()
    for _ in range(200_000):
        if engine.scheduler.idle:
            break
        assert engine.step() is not None, "the scheduler has requests but promises no step"
        engine.scheduler.check()
    assert engine.scheduler.idle
    assert engine.cache.num_referenced == 0
    assert engine.scheduler.table.num_free == engine.scheduler.table.capacity


def decode(engine: Engine, texts: list[list[int]], params: SamplingParams = LONG) -> list[Request]:
    requests = [engine.submit(str(i), text, params) for i, text in enumerate(texts)]
    run(engine)
    return requests


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("chunk", [4, 7, 128])
def test_every_tree_equals_plain_decoding(block_size: int, chunk: int) -> None:
    limits = SchedulerLimits(max_rows=min(64, chunk // 2), max_step_tokens=chunk, max_live_branches=256)
    params = dataclasses.replace(LONG, max_branches=2) if chunk < 8 else LONG
    texts = prompts(6, seed=chunk)
    engine = make(2048 // block_size, block_size, limits=limits)
    if chunk < 8:
        requests = decode(engine, texts, dataclasses.replace(params, fork=False))
        wanted = [reference_tree(t, dataclasses.replace(params, fork=False), 96) for t in texts]
    else:
        requests = decode(engine, texts)
        wanted = [reference_tree(t, LONG, 96) for t in texts]
        assert sum(len(r.branches) for r in requests) > 12, "too few forks to prove anything"
    assert [shape(r.root) for r in requests] == [shape(w) for w in wanted]


@pytest.mark.parametrize("num_blocks", [24, 30, 48, 72])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_trees_resume_exactly(num_blocks: int, caching: bool) -> None:
    """Defect of the reference: preempting a request with finished siblings killed its engine."""
    texts = prompts(24, seed=3, shared=6)
    limits = dataclasses.replace(LIMITS, prefix_caching=caching)
    engine = make(num_blocks, limits=limits)
    requests = decode(engine, texts)
    assert [shape(r.root) for r in requests] == [shape(reference_tree(t, LONG, 96)) for t in texts]
    assert engine.scheduler.preemptions > 0
    assert any(r.preemptions and len(r.branches) > 1 for r in requests)


def test_tables_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("apar.runtime.scheduler.BranchTable", fail)
    with pytest.raises(CapacityError, match="tables of 256 branches with paths of 96 tokens do not fit into memory"):
        make()


def test_what_a_preempted_request_says_of_itself() -> None:
    """Blocks that other requests refer to are no longer its own, and what it computed itself is no cached prompt."""
    params = dataclasses.replace(LONG, fork=False)
    prompt = next(prompt for prompt in prompts_of(21) if len(reference_tree(prompt, params, 96).tokens) > 40)
    engine = make(256)
    first = engine.submit("first", prompt, params)
    for _ in range(20):
        engine.step()
    second = engine.submit("second", prompt, params)
    for _ in range(5):
        engine.step()
        engine.scheduler.preempt(first)
        engine.step()
    blocks = int(engine.scheduler.table.num_blocks[first.root.slot])
    run(engine)
    assert first.preemptions == 5
    assert (first.cached_tokens, second.cached_tokens) == (0, 20)
    assert first.peak_blocks == second.peak_blocks == -(-(len(prompt) + len(first.root.tokens)) // 4) > blocks


def test_preemption_with_finished_siblings_and_finished_root() -> None:
    texts = prompts(12, seed=5)
    engine = make()
    requests = [engine.submit(str(i), t, LONG) for i, t in enumerate(texts)]
    hit_finished_sibling = hit_finished_root = False
    while not engine.scheduler.idle:
        engine.step()
        for request in list(engine.scheduler.running):
            done = [b for b in request.branches if b.finish_reason]
            if done and engine.scheduler.step_index % 5 == 0:
                hit_finished_sibling = True
                hit_finished_root |= request.root.finish_reason is not None
                engine.scheduler.preempt(request)
                engine.scheduler.check()
    assert hit_finished_sibling and hit_finished_root
    assert [shape(r.root) for r in requests] == [shape(reference_tree(t, LONG, 96)) for t in texts]
    assert engine.cache.num_referenced == 0


def test_reference_counts_after_reallocation() -> None:
    """Defect of the reference: wrong counts after blocks were allocated again leaked them."""
    engine = make(num_blocks=40)
    for seed in range(5):
        decode(engine, prompts(8, seed=seed))
        engine.cache.check()
        assert engine.cache.available == 40


def test_bursts_of_forks_and_copies_are_counted_before_a_step() -> None:
    """Defect of the reference: copy-on-write and forks were not counted, so a step could run out of blocks."""
    for num_blocks in range(24, 40, 3):
        engine = make(num_blocks)
        texts = prompts(10, seed=num_blocks)
        requests = decode(engine, texts)
        assert [shape(r.root) for r in requests] == [shape(reference_tree(t, LONG, 96)) for t in texts]


def test_forks_within_a_step_do_not_overshoot_the_branch_limit() -> None:
    """Defect of the reference: several forks in one step went past the limit."""
    params = dataclasses.replace(LONG, max_branches=5, max_depth=6)
    engine = make(4096)
    requests = [engine.submit(str(i), t, params) for i, t in enumerate(prompts(20, seed=9))]
    reached = 0
    while not engine.scheduler.idle:
        engine.step()
        for request in requests:
            assert len(request.live) <= 5
            reached = max(reached, len(request.live))
    assert reached == 5


def test_server_wide_branch_slots_are_never_exceeded() -> None:
    limits = SchedulerLimits(max_rows=16, max_step_tokens=64, max_live_branches=20)
    engine = make(4096, limits=limits)
    requests = decode(engine, prompts(30, seed=2), dataclasses.replace(LONG, max_depth=6))
    assert all(r.finish_reason in ("stop", "length") for r in requests)


def test_length_limit_keeps_finished_branches_and_newborn_children() -> None:
    """Defect of the reference: the length check overwrote finished branches and missed a child born in that step."""
    prompt = forking_prompt(6)
    for budget in range(1, 80, 3):
        params = dataclasses.replace(LONG, max_tokens=budget)
        engine = make()
        request = engine.submit("r", prompt, params)
        run(engine)
        own = sum(len(b.tokens) + b.end_dropped for b in request.branches)
        assert request.sampled == own <= budget
        assert all(b.finish_reason in ("stop", "length") for b in request.branches)
        whole = reference_tree(prompt, LONG, 96)
        assert_prefix(request.root, whole)
        if request.finish_reason == "length":
            assert request.sampled == budget or any(len(b.tokens) + b.start >= 96 for b in request.branches)


def assert_prefix(branch: Branch, plain: PlainBranch) -> None:
    """Equal as far as it goes, except that a [Fork] may have been banned near the end of the budget."""
    pairs = list(zip(branch.tokens, plain.tokens, strict=False))
    difference = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    if difference is not None:
        assert plain.tokens[difference] == FORK
    else:
        assert len(branch.tokens) <= len(plain.tokens)
    for mine, theirs in zip(branch.children, plain.children, strict=False):
        assert_prefix(mine, theirs)


def test_fork_is_never_the_last_token_before_a_limit() -> None:
    """Defect of the reference: [Fork] as the last token before a limit."""
    seen = 0
    prompt = forking_prompt(8)
    for limit in range(1, 30):
        engine = make()
        params = dataclasses.replace(LONG, max_branch_tokens=limit)
        request = engine.submit("r", prompt, params)
        run(engine)
        for branch in request.branches:
            seen += len(branch.forks)
            if branch.finish_reason == "length" and branch.tokens:
                assert branch.tokens[-1] != FORK
            assert len(branch.tokens) <= limit
    assert seen


def test_long_paths_are_forked_without_deep_copies() -> None:
    """Defect of the reference: every fork copied whole sequences. Here blocks are shared: only a tail is computed."""
    engine = make(4096, block_size=16, context=2048)
    prompt = forking_prompt(4, length=1500, context=2048)
    request = engine.submit("r", prompt, dataclasses.replace(LONG, max_tokens=200))
    run(engine)
    forks = len(request.branches) - 1
    assert forks >= 3
    assert engine.executor.computed_tokens <= len(prompt) + request.sampled + 2 * forks
    assert request.peak_blocks <= -(-1500 // 16) + 2 * (forks + 1) + request.sampled // 16


class Clock:
    """A clock for engines, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@pytest.mark.parametrize("moment", ["waiting", "prefilling", "decoding", "newborn", "preempted"])
def test_cancellation_frees_everything_at_once(moment: str, how: str) -> None:
    """Includes a defect of the reference: cancellation between a fork and its forced token."""
    limits = SchedulerLimits(max_rows=8, max_step_tokens=16, max_live_branches=64)
    clock = Clock()
    engine = Engine(PathExecutor(512, 4, 96), limits, clock=clock)
    scheduler = engine.scheduler
    other = engine.submit("other", [3, 4, 5], dataclasses.replace(LONG, fork=False))
    victim = engine.submit("victim", forking_prompt(6, length=51), LONG, timeout=100.0)
    reached = False
    for _ in range(500):
        state = "waiting" if not victim.branches else "prefilling"
        if victim.live:
            lengths = scheduler.table.length[[b.slot for b in victim.live]]
            computed = scheduler.table.computed[[b.slot for b in victim.live]]
            if (lengths - computed <= 2).all():
                state = "newborn" if (lengths - computed == 2).any() else "decoding"
        if moment == "preempted" and state == "decoding" and len(victim.live) > 1:
            scheduler.preempt(victim)
            state = "preempted"
        if state == moment:
            before = scheduler.cache.num_referenced
            live = list(victim.live)
            if how == "cancelled":
                scheduler.cancel(victim)
            else:
                clock.now = 99.9
                assert scheduler.expire(clock.now) is None
                clock.now = 100.0
                report = scheduler.expire(clock.now)
                assert report is not None and report.finished == [victim] and report.ended == live
            assert victim.finish_reason == how
            assert all(b.slot == -1 for b in victim.branches)
            assert scheduler.cache.num_referenced <= before
            scheduler.check()
            reached = True
            break
        engine.step()
    assert reached, f"the victim was never {moment}"
    run(engine)
    assert scheduler.expire(1e9) is None
    assert shape(other.root) == shape(reference_tree([3, 4, 5], dataclasses.replace(LONG, fork=False), 96))


def test_a_deadline_ends_a_request_with_parked_branches() -> None:
    clock = Clock()
    engine = Engine(PathExecutor(24, 4, 96), LIMITS, clock=clock)
    request = engine.submit("0", forking_prompt(8, length=9), LONG, timeout=5.0)
    while not any(branch.parked for branch in request.live):
        assert engine.step() is not None, "no branch was ever parked"
    clock.now = 6.0
    live = list(request.live)
    report = engine.step()
    assert report is not None and report.ended == live and report.finished == [request]
    assert request.finish_reason == "deadline"
    assert engine.scheduler.idle and engine.cache.num_referenced == 0
    engine.scheduler.check()


def test_deadlines_end_requests_one_by_one() -> None:
    """A step reports who expired before it and goes on with the others; who finished in time is not reported again."""
    clock = Clock()
    engine = Engine(PathExecutor(512, 4, 96), LIMITS, clock=clock)
    plain = dataclasses.replace(LONG, fork=False)
    texts = prompts(8, seed=2)
    requests = [engine.submit(str(i), t, plain, arrived=float(-i), timeout=20.0) for i, t in enumerate(texts)]
    late = engine.submit("late", [3, 4, 5], dataclasses.replace(plain, max_branch_tokens=90), arrived=-90.0, timeout=91)
    finished = []
    for _ in range(12):
        report = engine.step()
        assert report is not None
        finished += report.finished
        clock.now += 1.5
    assert [r.finish_reason for r in finished].count("deadline") >= 1
    run(engine)
    assert len(set(finished)) == len(finished)
    assert late.finish_reason == "deadline"
    for request, text in zip(requests, texts, strict=True):
        assert_prefix(request.root, reference_tree(text, plain, 96))
    assert {r.finish_reason for r in requests} <= {"deadline", "stop", "length"}


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "soon"])
def test_timeouts_are_checked(timeout: float) -> None:
    with pytest.raises(RequestError, match="timeout must be a number of seconds above 0"):
        make().submit("0", [3], LONG, timeout=timeout)


def test_empty_detail_is_a_branch_like_any_other() -> None:
    """Defect of the reference: end-of-sequence right after [Child]."""
    found = 0
    for seed in range(30):
        engine = make()
        for request in decode(engine, prompts(4, seed=seed)):
            found += sum(b.parent is not None and not b.tokens and b.finish_reason == "stop" for b in request.branches)
    assert found


def test_all_branches_may_fork_in_one_step() -> None:
    """Defect of the reference: all branches forking in one step."""
    engine = make(8192)
    texts = [[7, 8, 9]] * 16
    requests = decode(engine, texts, dataclasses.replace(LONG, max_depth=4))
    assert len({shape(r.root) for r in requests}) == 1
    assert shape(requests[0].root) == shape(reference_tree(texts[0], dataclasses.replace(LONG, max_depth=4), 96))


def test_identical_prompts_in_one_step_share_their_blocks() -> None:
    engine = make()
    prompt = np.random.default_rng(0).integers(3, 20, size=41).tolist()
    decode(engine, [prompt] * 6, dataclasses.replace(LONG, max_tokens=1))
    assert engine.executor.computed_tokens < 41 + 6 * 6
    assert engine.cache.hits == 5 * 10


def test_a_failed_step_ends_its_requests_and_no_other() -> None:
    engine = make()
    texts = prompts(6, seed=4, shared=12)
    first = [engine.submit(str(i), t, LONG) for i, t in enumerate(texts[:3])]
    for _ in range(4):
        engine.step()
    engine.executor.fail_next = True
    report = engine.step()
    assert report is not None and set(report.finished) == {r for r in first if r.error}
    assert all(r.finish_reason == "error" and "injected failure" in (r.error or "") for r in first if r.error)
    assert any(r.error for r in first)
    engine.scheduler.check()
    assert engine.cache.num_referenced == 0
    again = decode(engine, texts)
    assert [shape(r.root) for r in again] == [shape(reference_tree(t, LONG, 96)) for t in texts]


def test_a_failed_prefill_is_not_trusted_by_the_prefix_cache() -> None:
    limits = SchedulerLimits(max_rows=4, max_step_tokens=8, max_live_branches=64)
    engine = make(limits=limits)
    prompt = np.random.default_rng(0).integers(3, 20, size=30).tolist()
    for wait in range(5):
        broken = engine.submit("broken", prompt, dataclasses.replace(LONG, max_branches=2))
        for _ in range(wait):
            engine.step()
        engine.executor.fail_next = True
        engine.step()
        assert broken.finish_reason == "error"
        # What the failed step was to fill is garbage now.
        free = engine.cache.references == 0
        engine.executor.slots.reshape(-1, 4)[free & ~engine.cache._registered] = -7
        whole = engine.submit("whole", prompt, dataclasses.replace(LONG, max_branches=2, fork=False))
        run(engine)
        assert shape(whole.root) == shape(reference_tree(prompt, dataclasses.replace(LONG, fork=False), 96))


def test_rows_without_usable_logits_fail_alone() -> None:
    engine = make()
    engine.executor.poison = {19}
    texts = [[5, 6], [19, 6], [7, 6]]
    requests = decode(engine, texts)
    assert [r.finish_reason == "error" for r in requests] == [False, True, False]
    assert "not finite" in (requests[1].error or "")
    assert shape(requests[2].root) == shape(reference_tree([7, 6], LONG, 96))


def test_siblings_of_unusable_rows_end_with_them() -> None:
    engine = make()
    prompt = forking_prompt(3)
    request = engine.submit("r", prompt, LONG)
    while len(request.live) < 2:
        engine.step()
    engine.executor.poison = {prompt[0]}
    report = engine.step()
    assert report is not None and report.finished == [request]
    assert {b.finish_reason for b in request.branches if b in report.ended} == {"error"}
    assert engine.cache.num_referenced == 0
    engine.scheduler.check()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ([3] * 96, "the prompt has 96 tokens; this engine's context holds 96")],
)
def test_unacceptable_prompts(prompt: list[int], message: str) -> None:
    engine = make()
    with pytest.raises(CapacityError, match=message):
        engine.submit("r", prompt, LONG)
    assert engine.scheduler.idle


def test_context_shrinks_to_the_pool() -> None:
    engine = make(num_blocks=4, block_size=4)
    with pytest.raises(CapacityError, match="this engine's context holds 16"):
        engine.submit("r", [3] * 16, LONG)
    requests = decode(engine, [[3] * 13, [4] * 9, [5] * 2])
    assert all(r.finish_reason in ("stop", "length") for r in requests)
    assert [shape(r.root) for r in requests] == [
        shape(reference_tree(t, LONG, 16)) for t in ([3] * 13, [4] * 9, [5] * 2)
    ]


def test_priorities_go_first_and_arrival_decides_the_rest() -> None:
    limits = SchedulerLimits(max_rows=1, max_step_tokens=64, max_live_branches=16)
    engine = make(limits=limits)
    params = dataclasses.replace(LONG, fork=False, ignore_eos=True, max_tokens=8)
    order: list[str] = []
    for name, priority in (("a", 1), ("b", 1), ("c", 0), ("d", 0)):
        engine.submit(name, [int(ord(name) % 15) + 3] * 4, params, priority)
    while not engine.scheduler.idle:
        engine.step()
        order += [r.request_id for r in engine.scheduler.running if r.request_id not in order]
    assert order[:2] == ["c", "d"] and order[2:] == ["a", "b"]


def test_many_branches_of_one_request_do_not_starve_the_others() -> None:
    limits = SchedulerLimits(max_rows=8, max_step_tokens=32, max_live_branches=128)
    engine = make(4096, limits=limits)
    big = [engine.submit(f"big{i}", [5, 6, 7 + i], dataclasses.replace(LONG, max_depth=5)) for i in range(4)]
    small = [engine.submit(f"small{i}", [3 + i], dataclasses.replace(LONG, max_tokens=6)) for i in range(12)]
    run(engine)
    assert all(r.finish_reason in ("stop", "length") for r in big + small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rows": 0}, "max_rows must be a whole number"),
        ({"max_rows": 64, "max_step_tokens": 100}, "must be at least twice max_rows"),
    ],
)
def test_limits_are_checked(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        SchedulerLimits(**arguments)


def closed_form_peak(branches: list[Branch], block_size: int) -> int:
    """Most distinct blocks held in any step, from the tree alone.

    Block k of a path belongs to the branch that fills it: the parent below the fork's block, the branch from there
    on. A live branch holds the blocks of its whole path.
    """

    def owner(branch: Branch, block: int) -> tuple[int, int]:
        while branch.parent is not None and block < (branch.start - 2) // block_size:
            branch = branch.parent
        return branch.branch_id, block

    peak = 0
    for step in range(branches[0].first_step, max(b.last_step for b in branches) + 1):
        held = set()
        for branch in branches:
            if branch.first_step <= step <= branch.last_step:
                computed = branch.start + step - branch.first_step
                held |= {owner(branch, block) for block in range(-(-computed // block_size))}
        peak = max(peak, len(held))
    return peak


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_peak_blocks_equal_the_closed_form(block_size: int) -> None:
    forked = 0
    for i, prompt in enumerate(prompts(16, seed=block_size)):
        engine = make(4096 // block_size, block_size)
        request = engine.submit(str(i), prompt, LONG)
        run(engine)
        assert request.peak_blocks == closed_form_peak(request.branches, block_size)
        forked += len(request.branches) > 2
    assert forked >= 5


def test_special_tokens_are_where_they_belong() -> None:
    engine = make()
    for request in decode(engine, prompts(8, seed=21)):
        for branch in request.branches:
            assert CHILD not in branch.tokens and EOS not in branch.tokens
            assert branch.tokens.count(FORK) == len(branch.children) == len(branch.forks)
            pairs = list(zip(branch.tokens, branch.tokens[1:], strict=False))
            assert (FORK, FORK) not in pairs
            assert not branch.tokens or branch.parent is None or branch.tokens[0] != FORK


def test_requests_that_wait_for_their_prompts_cost_a_step_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step looks at the requests whose prompts it computes, and once at each that is new, not at all in the queue."""
    engine = make(num_blocks=4096, limits=SchedulerLimits(max_rows=8, max_step_tokens=16, max_live_branches=128))
    scheduler = engine.scheduler
    looked: list[Branch] = []
    attach = scheduler.blocks.attach_prefix
    monkeypatch.setattr(scheduler.blocks, "attach_prefix", lambda branch: (looked.append(branch), attach(branch)))
    for i in range(16):  # all are admitted at once
        engine.submit(str(i), [3 + (i + j) % 17 for j in range(60)], SamplingParams(max_tokens=1))
    engine.step()
    assert len(scheduler.running) == 16 and len(looked) <= 16 + 2
    while len(scheduler.running) > 8:
        looked.clear()
        engine.step()
        scheduler.check()
        assert len(looked) <= 3
    run(engine)


def test_one_branch_extends_its_blocks_as_a_step_does() -> None:
    """`extend` of one branch is `claim` and `take`: the same blocks, copies and counts, shared tails included."""
    taken = []
    for alone in (False, True):
        engine = make(block_size=4)
        request = engine.submit("r", forking_prompt(3), LONG)
        while len(request.live) < 2:
            assert engine.step() is not None
        table, blocks = engine.scheduler.table, engine.scheduler.blocks
        copies = []
        for branch in request.live:
            for end in (int(table.length[branch.slot]), int(table.length[branch.slot]) + 9):
                if alone:
                    copies.append(blocks.extend(branch.slot, end).tolist())
                else:
                    claim = blocks.claim(np.array([branch.slot]), np.array([end], dtype=np.int32))
                    copies.append(blocks.take(claim).tolist())
        requests, index = engine.scheduler.requests, request.index
        engine.scheduler.check()
        listed = [table.blocks(branch.slot).tolist() for branch in request.live]
        taken.append((copies, listed, int(requests.held[index]), int(requests.peak[index])))
    assert taken[0] == taken[1]
    assert any(taken[0][0])  # the child's tail was shared
