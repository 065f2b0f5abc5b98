"""The prefix cache's host tier: its books, and that what comes back from it is what went out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from path_executor import PathExecutor, reference_tree, shape

from apar.export.errors import CapacityError, ExecutorError
from apar.runtime.branch import Request
from apar.runtime.engine import Engine
from apar.runtime.host_tier import HostTier
from apar.runtime.kv_cache import ROOT_DIGEST, KVCache, KVCacheError, chain_digest
from apar.runtime.limits import SchedulerLimits
from apar.runtime.llm import LLM
from apar.runtime.metrics import Metrics
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, StepInputs

LONG = SamplingParams(max_tokens=100_000, max_depth=3)
LIMITS = SchedulerLimits(max_rows=64, max_step_tokens=128, max_live_branches=256)


def chain(first: int, length: int) -> list[bytes]:
    digests = [ROOT_DIGEST]
    for i in range(length):
        digests.append(chain_digest(digests[-1], np.array([first, i], dtype=np.int32)))
    return digests[1:]


class Books:
    """A pool of blocks with a host tier, and what lies where: a digest stands for a block's content."""

    def __init__(self, num_blocks: int, host_blocks: int) -> None:
        self.host = HostTier(host_blocks)
        self.cache = KVCache(num_blocks, 2, host=self.host)
        self.pool: list[bytes] = [b""] * num_blocks
        self.memory: list[bytes] = [b""] * host_blocks
        self.swapped = (0, 0)

    def fill(self, digests: Sequence[bytes]) -> np.ndarray:
        """Compute a path of its own in a step, then let it go."""
        blocks = self.cache.allocate(len(digests))
        self.step()
        for block, digest in zip(blocks.tolist(), digests, strict=True):
            self.pool[block] = digest
            self.cache.register(block, digest)
        self.cache.release(blocks)
        self.cache.check()
        return blocks

    def step(self) -> None:
        out, back = self.host.take_swaps()
        for block, host in out.tolist():
            self.memory[host] = self.pool[block]
        for host, block in back.tolist():
            self.pool[block] = self.memory[host]
        self.swapped = len(out), len(back)
        self.cache.check([np.flatnonzero(self.cache.references > 0)])
        for digest, host in self.host._held.items():
            assert self.memory[host] == digest

    def find(self, digests: Sequence[bytes]) -> np.ndarray:
        """Look a path up, as a step does; contents are checked."""
        blocks = self.cache.match(digests)
        self.step()
        assert [self.pool[block] for block in blocks.tolist()] == list(digests[: blocks.size])
        return blocks


class TestBooks:
    def test_what_is_evicted_comes_back(self) -> None:
        books = Books(4, 8)
        one, other = chain(1, 4), chain(2, 4)
        books.fill(one)
        books.fill(other)
        assert books.swapped == (4, 0) and books.cache.known(one) == 0
        blocks = books.find(one)
        assert blocks.size == 4 and books.swapped == (4, 4) and books.host.hits == 4
        books.cache.release(blocks)

    def test_a_path_in_both_tiers(self) -> None:
        """Its end goes first: the beginning is found in the pool, the rest in host memory."""
        books = Books(6, 8)
        path = chain(1, 5)
        books.fill(path)
        books.fill(chain(2, 3))
        assert books.swapped == (2, 0) and books.cache.known(path) == 3
        blocks = books.find(path)
        assert blocks.size == 5 and books.swapped[1] == 2
        books.cache.release(blocks)

    def test_what_came_back_is_not_copied_out_again(self) -> None:
        books = Books(4, 8)
        one = chain(1, 4)
        books.fill(one)
        books.fill(chain(2, 4))
        books.cache.release(books.find(one))
        books.fill(chain(3, 4))
        assert books.swapped == (0, 0), "host memory has it still"
        assert books.find(one).size == 4

    def test_the_oldest_goes_and_a_path_loses_its_end(self) -> None:
        books = Books(4, 6)
        one, two = chain(1, 4), chain(2, 4)
        books.fill(one)
        books.fill(two)
        books.fill(chain(3, 4))
        assert books.host.num_held == 6
        assert books.find(one).size == 2

    def test_what_the_pool_has_too_goes_first(self) -> None:
        host = HostTier(4)
        first, second, third = chain(1, 2), chain(2, 2), chain(3, 3)
        host.keep([0, 1], first)
        host.keep([2, 3], second)
        host.take_swaps()
        host.bring_back(host.pin(second), [0, 1])
        host.keep([4], third[:1])
        assert [digest in host for digest in (*first, *second)] == [False, True, True, True], "they are to be copied"
        host.take_swaps()
        host.keep([5, 6], third[1:])
        assert [digest in host for digest in (*first, *second, *third)] == [False, True, False, False, True, True, True]

    def test_fewer_host_blocks_than_a_step_evicts(self) -> None:
        """The beginning of the path stays, since its end is of no use without it."""
        books = Books(4, 1)
        one = chain(1, 4)
        books.fill(one)
        books.fill(chain(2, 4))
        assert books.swapped == (1, 0)
        assert books.find(one).size == 1

    def test_what_is_to_come_back_is_not_given_up_for_what_is_evicted_for_it(self) -> None:
        books = Books(4, 4)
        one, two = chain(1, 4), chain(2, 4)
        books.fill(one)
        books.fill(two)
        blocks = books.find(one)
        assert blocks.size == 4 and books.swapped == (0, 4) and not any(digest in books.host for digest in two)

    def test_only_as_much_comes_back_as_there_is_room_for(self) -> None:
        books = Books(4, 8)
        one = chain(1, 4)
        books.fill(one)
        held = books.cache.allocate(3)
        books.step()
        assert books.cache.match(one).size == 1, "its beginning is in the pool"
        books.cache.release(held[:1])
        assert books.cache.available == 1
        books.cache.release(np.flatnonzero(books.cache.references[:] > 0).astype(np.int32))
        assert books.find(one).size == 4

    def test_a_block_evicted_before_it_was_filled(self) -> None:
        """Whoever looked it up gave it back before the step: nothing is copied into a block of someone else's."""
        books = Books(4, 8)
        one = chain(1, 4)
        books.fill(one)
        books.fill(chain(2, 4))
        books.cache.release(books.cache.match(one))
        taken = books.cache.allocate(4)
        books.step()
        assert books.swapped == (4, 0)
        books.cache.release(taken)
        assert books.find(one).size == 4

    def test_out_and_back_in_the_same_step(self) -> None:
        books = Books(4, 8)
        one = chain(1, 2)
        books.fill(one)
        taken = books.cache.allocate(4)
        books.cache.release(taken[:3])
        blocks = books.find(one)  # its copy out has not been made yet
        assert blocks.size == 2 and books.swapped == (2, 2)

    def test_a_step_that_failed_leaves_no_host_block_that_lies(self) -> None:
        books = Books(4, 8)
        one, two = chain(1, 4), chain(2, 4)
        books.fill(one)
        blocks = books.cache.allocate(4)
        out, _ = books.host.take_swaps()
        books.host.distrust(out[:, 1].tolist())
        books.cache.release(blocks)
        books.cache.check()
        assert books.host.num_held == 0 and books.cache.match(one).size == 0
        books.fill(two)

    def test_what_is_forgotten_is_forgotten_in_both_tiers(self) -> None:
        books = Books(4, 8)
        one = chain(1, 4)
        books.fill(one)
        books.fill(chain(2, 4))
        blocks = books.cache.match(one)
        books.cache.forget(blocks.tolist())
        out, back = books.host.take_swaps()
        assert not back.size and len(out) == 4
        books.cache.release(blocks)
        books.cache.check()
        assert books.cache.match(one).size == 0 and books.host.num_held == 4

    def test_what_is_evicted_again_is_among_the_last_to_go(self) -> None:
        host = HostTier(2)
        one, other, third = chain(1, 1), chain(2, 1), chain(3, 1)
        host.keep([5, 6], [*one, *other])
        host.take_swaps()
        host.bring_back(host.pin(one), [3])
        host.take_swaps()
        host.keep([3, 7], [*one, *third])
        assert [digest in host for digest in (*one, *other, *third)] == [True, False, True]

    def test_what_is_forgotten_is_not_copied(self) -> None:
        host = HostTier(2)
        path = chain(1, 2)
        host.keep([5, 6], path)
        host.forget(path[0])
        host.check({})
        assert host.take_swaps()[0][:, 0].tolist() == [6]
        host.bring_back(host.pin(path[1:]), [3])
        host.forget(path[1])
        host.check({})
        assert not host.take_swaps()[1].size and host.num_held == 0

    def test_damaged_books_are_found(self) -> None:
        def broken() -> Books:
            books = Books(4, 8)
            books.fill(chain(1, 4))
            books.cache.allocate(2)
            return books

        for damage, message in (
            (lambda host: host._free.pop(), "do not add up"),
            (lambda host: host._free.append(host._free[0]), "on the free list twice"),
            (lambda host: host._held.update({b"x": next(iter(host._held.values()))}), "holds two contents"),
            (lambda host: host._digests.reverse(), "a digest that is not its own"),
            (lambda host: host._out.update({host._free[0]: 1}), "holds nothing is to be copied"),
            (lambda host: host._in.update({next(iter(host._held.values())): 1}), "holds something else"),
            (lambda host: host._out.update(dict.fromkeys(host._out, 1)), "copied out twice"),
        ):
            books = broken()
            damage(books.host)
            with pytest.raises(KVCacheError, match=message):
                books.host.check(books.cache._block_of)


def run(engine: Engine) -> None:
    for _ in range(100_000):
        if engine.scheduler.idle:
            break
        assert engine.step() is not None
        engine.scheduler.check()
    assert engine.scheduler.idle and engine.cache.num_referenced == 0


def texts(count: int) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(3, 20, size=int(random.integers(8, 24))).tolist() for _ in range(count)]


def decode(host_blocks: int, num_blocks: int = 40) -> tuple[list[Request], Engine, PathExecutor]:
    executor = PathExecutor(num_blocks, 4, 96, host_blocks)
    engine = Engine(executor, LIMITS)
    requests = [engine.submit(str(i), text, LONG) for i, text in enumerate(texts(12))]
    run(engine)
    return requests, engine, executor


class FailsWhileSwapping(PathExecutor):
    """Its `when`-th step with swaps leaves garbage wherever it was to write."""

    def __init__(self, when: int, *sizes: int) -> None:
        super().__init__(*sizes)
        self.when = when
        self.swaps = 0

    def execute(self, inputs: StepInputs) -> Float32Array:
        if inputs.swap_out.size or inputs.swap_in.size:
            self.fail_next = self.swaps == self.when
            self.swaps += 1
        return super().execute(inputs)


class TestScheduling:
    def test_preempted_answers_come_back_the_same_and_are_not_computed_again(self) -> None:
        plain, alone, without = decode(0)
        kept, engine, executor = decode(200)
        assert alone.scheduler.preemptions > 3 and engine.scheduler.preemptions > 3
        expected = [shape(reference_tree(text, LONG, 96)) for text in texts(12)]
        assert [shape(r.root) for r in plain] == [shape(r.root) for r in kept] == expected
        assert executor.swapped_in > 20
        assert executor.computed_tokens < without.computed_tokens - 2 * executor.swapped_in

    def test_another_turn_of_a_conversation(self) -> None:
        executor = PathExecutor(24, 4, 96, 100)
        engine = Engine(executor, LIMITS)
        params = dataclasses.replace(LONG, fork=False)
        first = engine.submit("first", texts(1)[0], params)
        run(engine)
        for i, text in enumerate(texts(9)[1:]):
            engine.submit(f"other {i}", text, params)
        run(engine)
        said = [*first.prompt, *first.root.tokens]
        second = engine.submit("second", [*said, 5, 6, 7], params)
        before = engine.cache.host.hits if engine.cache.host else -1
        run(engine)
        assert engine.cache.host is not None and engine.cache.host.hits > before
        assert second.cached_tokens == len(said) // 4 * 4
        assert shape(second.root) == shape(reference_tree([*said, 5, 6, 7], params, 96))

    @pytest.mark.parametrize("when", range(0, 45, 3))
    def test_a_failed_step_harms_only_those_in_it(self, when: int) -> None:
        executor = FailsWhileSwapping(when, 40, 4, 96, 60)
        engine = Engine(executor, LIMITS)
        requests = [engine.submit(str(i), text, LONG) for i, text in enumerate(texts(12))]
        run(engine)
        failed = [r for r in requests if r.error]
        assert executor.swaps > when and 0 < len(failed) < len(requests)
        assert all("injected failure" in str(r.error) for r in failed)
        for text, request in zip(texts(12), requests, strict=True):
            if not request.error:
                assert shape(request.root) == shape(reference_tree(text, LONG, 96))

    def test_what_a_failed_step_was_to_bring_to_one_who_waits(self) -> None:
        """A prompt found in host memory while another one has all tokens of the step, which fails."""
        executor = PathExecutor(30, 4, 96, 60)
        engine = Engine(executor, dataclasses.replace(LIMITS, max_rows=4, max_step_tokens=8))
        params = dataclasses.replace(LONG, fork=False, max_branch_tokens=4)
        first = engine.submit("first", texts(1)[0], params)
        run(engine)
        engine.cache.release(engine.cache.allocate(30))  # all that is cached goes to host memory with the next step
        failing = engine.submit("failing", list(range(3, 19)), params)
        waiting = engine.submit("waiting", first.prompt, params)
        executor.fail_next = True
        engine.step()
        assert failing.error and not waiting.error and engine.cache.host is not None
        assert engine.cache.host.swapped_in > 3 and engine.cache.host.num_held == 0
        run(engine)
        again = engine.submit("again", first.prompt, params)
        run(engine)
        expected = shape(reference_tree(first.prompt, params, 96))
        assert [shape(r.root) for r in (first, waiting, again)] == [expected] * 3

    @pytest.mark.parametrize("steps", [3, 9, 20])
    def test_who_found_a_block_that_did_not_come_computes_it(self, steps: int) -> None:
        """A request that decodes but had no row in the step that failed."""
        executor = PathExecutor(400, 4, 96, 60)
        engine = Engine(executor, LIMITS)
        requests = [engine.submit(str(i), text, LONG) for i, text in enumerate(texts(6))]
        for _ in range(steps):
            engine.step()
        other = next(r for r in requests if r.live and not engine.scheduler.requests.catching_up[r.index])
        block = int(engine.scheduler.table.blocks(other.live[0].slot)[0])
        executor.slots.reshape(400, 4)[block] = -7
        engine.cache.forget([block])
        engine.scheduler.catching.distrust({block})
        engine.scheduler.check()
        run(engine)
        assert [shape(r.root) for r in requests] == [shape(reference_tree(text, LONG, 96)) for text in texts(6)]

    def test_host_blocks_need_the_prefix_cache(self) -> None:
        with pytest.raises(CapacityError, match="prefix_caching is off"):
            Engine(PathExecutor(40, 4, 96, 8), dataclasses.replace(LIMITS, prefix_caching=False))

    def test_metrics(self) -> None:
        _, engine, executor = decode(200)
        page = Metrics().snapshot(engine)
        assert page.gauges["host_blocks_total"] == 200 and 0 < page.gauges["host_blocks_used"] <= 200
        assert page.counters["blocks_swapped_in_total"] == executor.swapped_in
        assert page.counters["blocks_swapped_out_total"] >= executor.swapped_in
        assert page.counters["host_cache_hits_total"] >= 4 * executor.swapped_in
        page = Metrics().snapshot(decode(0)[1])
        assert page.gauges["host_blocks_total"] == page.counters["blocks_swapped_in_total"] == 0


class TestTorchExecutor:
    @pytest.mark.slow
    def test_the_tiny_model_token_for_token(self, tiny_engine: Path, heldout: list[dict[str, Any]]) -> None:
        """Answers that preempt each other in a small pool, with and without host blocks, and undisturbed."""
        prompts = [entry["messages"] for entry in heldout[:10]]
        params = SamplingParams(max_tokens=150)

        def answers(num_blocks: int, **options: int) -> tuple[list[Any], dict[str, Any]]:
            with LLM(tiny_engine, executor="torch", device="cpu", num_blocks=num_blocks, **options) as llm:
                found = llm.generate(prompts, params)
                return [[(b.parent_id, b.token_ids) for b in a.branches] for a in found], llm.stats()

        undisturbed, ample = answers(1000)
        without, plain = answers(34)
        kept, stats = answers(34, host_blocks=300)
        assert undisturbed == without == kept
        assert not ample["preemptions"] and plain["preemptions"] and stats["preemptions"]
        assert stats["swapped_in"] > 0 and stats["host_blocks_total"] == 300

    def test_sizes(self, tiny_engine: Path) -> None:
        def load(executor: str = "torch", **options: int) -> LLM:
            device = {} if executor == "auto" else {"device": "cpu"}
            return LLM(tiny_engine, executor=executor, num_blocks=40, **device, **options)

        with load(kv_host_memory_bytes=1 << 20) as llm:
            manifest = llm.manifest
            block = manifest.block_size * manifest.decoder.kv_bytes_per_token("float32")
            assert llm.executor.host_blocks == (1 << 20) // block > 0
        with load(host_blocks=0) as llm:
            assert llm.executor.host_blocks == 0 and llm.stats().get("swapped_in") is None
        for options, message in (
            ({"host_blocks": 3, "kv_host_memory_bytes": 1 << 20}, "not both"),
            ({"host_blocks": -1}, "at least 0, not -1"),
            ({"kv_host_memory_bytes": 10}, "give more with kv_host_memory_bytes"),
            ({"host_blocks": 10**9}, "give fewer"),
        ):
            with pytest.raises(ExecutorError, match=message):
                load(**options)
        for name in ("onnx", "auto"):
            with load(name, host_blocks=0) as llm:
                assert llm.executor.host_blocks == 0
            with pytest.raises(ExecutorError, match="offers no host blocks, its KV pool is in host memory already"):
                load(name, host_blocks=5)
        with pytest.raises(ExecutorError, match="tensorrt executor offers no host blocks, what is evicted is computed"):
            LLM(tiny_engine, executor="tensorrt", kv_host_memory_bytes=1 << 20)
