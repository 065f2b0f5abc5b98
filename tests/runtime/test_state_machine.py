"""A Hypothesis state machine over requests, branches and blocks, against decoding without any of them.

Whatever is added, stepped, drafted, cancelled, preempted or failed, in whatever order: the books balance after every
rule, no step reads a slot that was not written or writes one that is shared (the path executor checks), and
every request that ran to its end gives exactly the tree that plain decoding gives.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import pytest
from drafting import RandomDrafter, random_tree, speculate
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from path_executor import UNWRITTEN, PathExecutor, reference_tree, shape

from apar.runtime import branch_blocks
from apar.runtime.branch import Request, RequestState
from apar.runtime.engine import Engine
from apar.runtime.kv_cache import chain_digest
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.service_level import ServiceLevel
from apar.runtime.step import Int32Array
from apar.runtime.step_cost import Float64Array, StepCost

CONTEXT = 64
TOKENS_OF: dict[bytes, list[int]] = {}
"""Of every digest that was ever made, the tokens of its block."""
HEADS = [np.random.default_rng(seed).integers(3, 20, size=20).tolist() for seed in range(3)]


@pytest.fixture(autouse=True)
def remember_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    def remembering(parent: bytes, tokens: Int32Array) -> bytes:
        digest = chain_digest(parent, tokens)
        TOKENS_OF[digest] = tokens.tolist()
        return digest

    monkeypatch.setattr(branch_blocks, "chain_digest", remembering)


class SlowSteps(StepCost):
    """A step takes a second, and another one for every four tokens: soon too long for a service level."""

    def seconds(self, tokens: npt.ArrayLike, kv: npt.ArrayLike) -> Float64Array:
        return 1.0 + 0.25 * np.asarray(tokens, dtype=float)


class BranchesAndBlocks(RuleBasedStateMachine):
    """Rules drive the real engine, scheduler and KV books over the path executor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.requests: list[tuple[Request, list[int]]] = []

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 8]),
        spare=st.integers(0, 60),
        rows=st.sampled_from([3, 8, 40]),
        caching=st.booleans(),
        drafts=st.none()
        | st.tuples(st.integers(1, 40), st.sampled_from([0.3, 0.8, 1.0]), st.sampled_from([4, 16, 200])),
        adaptive=st.booleans(),
        host=st.sampled_from([0, 1, 5, 40]),
    )
    def start(
        self,
        block_size: int,
        spare: int,
        rows: int,
        caching: bool,
        drafts: tuple[int, float, int] | None,
        adaptive: bool,
        host: int,
    ) -> None:
        limits = SchedulerLimits(
            max_rows=rows,
            max_step_tokens=2 * rows + 5,
            max_live_branches=3 * rows + 20,
            prefix_caching=caching,
            fork_policy="adaptive" if adaptive else "always",
            service_level=ServiceLevel(first_token_seconds=8.0, latency_factor=1.5),
        )
        self.executor = PathExecutor(CONTEXT // block_size + spare, block_size, CONTEXT, host if caching else 0)
        self.now = 0.0
        self.engine = Engine(self.executor, limits, clock=lambda: self.now, step_cost=SlowSteps())
        if drafts is not None:
            nodes, chance, step_tokens = drafts
            tree = random_tree(np.random.default_rng(nodes), nodes)
            speculate(self.engine, RandomDrafter(self.engine.scheduler.table, tree, chance, seed=nodes), step_tokens)
        # Limits that depend on what else is live would make a tree depend on the schedule: keep them out of reach.
        self.params = SamplingParams(max_tokens=100_000, max_depth=2, max_branch_tokens=24)
        self.plain = SamplingParams(max_tokens=100_000, fork=False, max_branch_tokens=24)
        self.may_fork = rows == 40

    @rule(
        head=st.sampled_from(HEADS),
        keep=st.integers(0, 20),
        tail=st.lists(st.integers(3, 19), min_size=1, max_size=9),
        timeout=st.none() | st.integers(1, 60),
    )
    def add(self, head: list[int], keep: int, tail: list[int], timeout: int | None) -> None:
        prompt = head[:keep] + tail
        params = self.params if self.may_fork else self.plain
        request = self.engine.submit(f"r{len(self.requests)}", prompt, params, timeout=timeout)
        self.requests.append((request, prompt))
        self.operations += 1

    @rule(count=st.integers(1, 25))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.now += 1.0
            if self.engine.step() is None:
                assert self.engine.scheduler.idle
            self.engine.scheduler.check()
            for request, _ in self.requests:
                late = request.deadline is not None and request.deadline <= self.now
                assert not late or request.state is RequestState.FINISHED
            self.operations += 1

    @rule()
    def fail(self) -> None:
        self.executor.fail_next = True
        self.engine.step()
        self.executor.fail_next = False
        # Blocks that nobody holds or knows may be overwritten by anything.
        books = self.engine.cache
        unknown = (books.references == 0) & ~books._registered
        if books.host is not None:
            unknown[list(books.host._out.values())] = False  # unless the next step is to copy them out
        self.executor.slots.reshape(books.num_blocks, -1)[unknown] = UNWRITTEN
        if books.host is not None:
            self.executor.host[books.host._free] = UNWRITTEN
        self.operations += 1

    @rule(data=st.data())
    @precondition(lambda self: any(r.state is not RequestState.FINISHED for r, _ in self.requests))
    def cancel(self, data: st.DataObject) -> None:
        alive = [r for r, _ in self.requests if r.state is not RequestState.FINISHED]
        request = alive[data.draw(st.integers(0, len(alive) - 1))]
        self.engine.scheduler.cancel(request)
        assert not request.live
        self.operations += 1

    @rule(data=st.data())
    @precondition(lambda self: bool(self.engine.scheduler.running))
    def preempt(self, data: st.DataObject) -> None:
        running = self.engine.scheduler.running
        self.engine.scheduler.preempt(running[data.draw(st.integers(0, len(running) - 1))])
        self.operations += 1

    @rule(data=st.data())
    @precondition(lambda self: any(r.live for r in self.engine.scheduler.running))
    def finish_a_branch(self, data: st.DataObject) -> None:
        """What a stop string does."""
        live = [b for r in self.engine.scheduler.running for b in r.live]
        branch = live[data.draw(st.integers(0, len(live) - 1))]
        self.engine.scheduler.finish_branch(branch, "stop_string")
        self.operations += 1

    @rule(count=st.integers(1, 12))
    @precondition(lambda self: self.engine.cache.num_cached > 0)
    def evict(self, count: int) -> None:
        """What a step does that needs many blocks; those that a host tier keeps go to it with the next step."""
        books = self.engine.cache
        books.release(books.allocate(min(books._num_free + count, books.available)))
        self.operations += 1

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check()
            self.check_contents()

    def check_contents(self) -> None:
        """What either tier holds under a digest is that block of that path, unless the next step is to bring it."""
        books = self.engine.cache
        host = books.host
        coming = set() if host is None else set(host._in.values())
        blocks = self.executor.slots.reshape(books.num_blocks, -1)
        for digest, block in books._block_of.items():
            assert block in coming or blocks[block].tolist() == TOKENS_OF[digest]
        if host is not None:
            for digest, block in host._held.items():
                found = blocks[host._out[block]] if block in host._out else self.executor.host[block]
                assert found.tolist() == TOKENS_OF[digest]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(100_000):
            if self.engine.step() is None:
                break
            self.engine.scheduler.check()
        assert self.engine.scheduler.idle
        assert self.engine.cache.num_referenced == 0
        assert self.engine.scheduler.table.num_free == self.engine.scheduler.table.capacity
        params = self.params if self.may_fork else self.plain
        for request, prompt in self.requests:
            disturbed = any(
                b.finish_reason in ("error", "cancelled", "deadline", "stop_string") for b in request.branches
            )
            if disturbed or not request.branches:
                continue
            context = min(CONTEXT, self.engine.scheduler.max_context)
            # Load may deny a fork; nothing else of an answer may depend on it.
            denied = self.engine.scheduler.counters.forks_denied
            by_load = denied.get("rows", 0)
            assert shape(request.root) == shape(
                reference_tree(prompt, params, context, request.root if by_load else None)
            )


BranchesAndBlocks.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestBranchesAndBlocks = BranchesAndBlocks.TestCase


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_a_million_operations(part: int) -> None:
    """Random operations on one long-lived engine after another; APAR_SOAK_OPERATIONS changes how many in all parts.

    In parts, since pytest's faulthandler takes a test of more than five minutes for one that hangs.
    """
    wanted = int(os.environ.get("APAR_SOAK_OPERATIONS", "1000000")) // 10
    random = np.random.default_rng(part)
    done = 0
    while done < wanted:
        machine = BranchesAndBlocks()
        machine.start(
            int(random.choice([1, 2, 4, 8])),
            int(random.integers(0, 61)),
            int(random.choice([3, 8, 40])),
            bool(random.integers(2)),
            (int(random.integers(1, 41)), float(random.choice([0.3, 0.8, 1.0])), int(random.choice([4, 16, 200]))),
            bool(random.integers(2)),
            int(random.choice([0, 1, 5, 40])),
        )
        scheduler = machine.engine.scheduler
        for _ in range(400):
            choice = random.random()
            if choice < 0.25 and len(scheduler.waiting) < 20:
                head = HEADS[int(random.integers(3))][: int(random.integers(21))]
                tail = random.integers(3, 20, size=int(random.integers(1, 10))).tolist()
                machine.add(head, 20, tail, int(random.integers(1, 61)) if random.random() < 0.3 else None)
            elif choice < 0.9:
                machine.step(int(random.integers(1, 26)))
            elif choice < 0.92:
                machine.fail()
            elif scheduler.running:
                request = scheduler.running[int(random.integers(len(scheduler.running)))]
                if choice < 0.94:
                    scheduler.cancel(request)
                elif choice < 0.97:
                    scheduler.preempt(request)
                else:
                    scheduler.finish_branch(request.live[int(random.integers(len(request.live)))], "stop_string")
                machine.operations += 1
            if machine.engine.cache.num_cached and random.random() < 0.1:
                machine.evict(int(random.integers(1, 13)))
            machine.books_balance()
        machine.teardown()
        done += machine.operations
