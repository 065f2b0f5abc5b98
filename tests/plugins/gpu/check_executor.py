"""The executor for CUDA devices, all but its graphs, in Triton's interpreter: against the plain torch executor."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from step_builder import random_steps
from triton.runtime.errors import OutOfResources

from apar.export import onnx_engine
from apar.export.errors import ExecutorError
from apar.plugins.gpu.fork_attention import ForkAttention
from apar.runtime.bench.gpu.models import decode_step
from apar.runtime.engine import Engine
from apar.runtime.engine_source import tiny_checkpoint
from apar.runtime.executor import load_executor
from apar.runtime.executor.base import Executor
from apar.runtime.executor.cuda.buckets import DRAFT_STEPS, DRAFT_WORDS, Bucket, Buckets
from apar.runtime.executor.cuda.executor import CudaExecutor
from apar.runtime.executor.cuda.graphs import Recorder, Replay
from apar.runtime.executor.cuda.step_buffers import Layout, StepBuffers, idle_step
from apar.runtime.executor.cuda.step_memory import StepMemory
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import StepInputs

LIMITS = SchedulerLimits(max_rows=4, max_step_tokens=16)
SMALL = {"device": "cpu", "num_blocks": 64, "max_rows": LIMITS.max_rows, "max_step_tokens": LIMITS.max_step_tokens}


class Rehearsal(Recorder):
    """Stands in for CUDA graphs, which the CPU has not: replays call the launches of the capture again, over the
    addresses and shapes that they had then, whatever step is asked for."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, work: Callable[[], None]) -> Replay:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


class RehearsedExecutor(CudaExecutor):
    """`CudaExecutor` with `Rehearsal`."""

    def _recorder(self) -> Recorder:
        self.rehearsal = Rehearsal()
        return self.rehearsal


@pytest.fixture(scope="module")
def random_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with grouped heads and biases."""
    folder = tmp_path_factory.mktemp("random")
    make_checkpoint(folder / "checkpoint", "attention_bias", dtype=torch.float32, head_dim=64, num_key_value_heads=2)
    onnx_engine.build(folder / "checkpoint", folder / "engine", block_size=8)
    return folder / "engine"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tiny") / "engine"
    onnx_engine.build(tiny_checkpoint(), target)
    return target


def life(seed: int, steps: int) -> list[StepInputs]:
    found = random_steps(seed, vocab_size=260, num_blocks=64, block_size=8, steps=steps)
    return [step.inputs for step in itertools.islice(found, steps)]


def worst(one: Executor, other: Executor, steps: list[StepInputs]) -> float:
    return max(float(np.abs(one.execute(s) - other.execute(s)).max(initial=0.0)) for s in steps)


@pytest.mark.parametrize(("dtype", "bound", "count"), [("float32", 1e-4, 4), ("bfloat16", 0.1, 2)])
def test_random_lives(random_engine: Path, dtype: str, bound: float, count: int) -> None:
    """Chunks, forks, drafts, padding: buckets that fit and steps that fit none. Logits reach about 4."""
    executor = CudaExecutor(random_engine, dtype=dtype, checked=True, **SMALL)
    oracle = load_executor(random_engine, "torch", device="cpu", num_blocks=64)
    steps = life(2, count)
    assert count < 3 or (any(s.tree_mask.size for s in steps) and any(s.slot_copies.size for s in steps))
    assert worst(executor, oracle, steps) < bound
    executor.close()
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.execute(steps[0])


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.1), ("fp8", 0.4)])
def test_weights_of_8_bits(random_engine: Path, form: str, bound: float) -> None:
    executor = CudaExecutor(random_engine, dtype="float32", weights=form, **SMALL)
    oracle = load_executor(random_engine, "torch", device="cpu", num_blocks=64)
    steps = life(3, 1)
    assert 1e-4 < worst(executor, oracle, steps) < bound


def generate(executor: Executor, tokens: int) -> list[list[int]]:
    """What every branch of one greedy request generates."""
    engine = Engine(executor, LIMITS)
    request = engine.submit("a", [1, *range(300, 318)], SamplingParams(max_tokens=tokens, temperature=0.0))
    while engine.step() is not None:
        pass
    engine.cache.check()
    return [list(branch.tokens) for branch in request.branches]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tiny_model_token_for_token(tiny: Path, dtype: str) -> None:
    """Through scheduler and device sampling; prefill in chunks, then decoding."""
    executor = CudaExecutor(tiny, dtype=dtype, **SMALL)
    expected = generate(load_executor(tiny, "torch", device="cpu", num_blocks=64), 4)
    assert generate(executor, 4) == expected


def test_blocks_go_to_host_memory_and_come_back(random_engine: Path) -> None:
    """Out, slot copies and back in this order, more than are on the way at a time; as the plain executor does."""
    executor = CudaExecutor(random_engine, dtype="float32", host_blocks=9, **SMALL)
    oracle = load_executor(random_engine, "torch", device="cpu", num_blocks=64, host_blocks=9)
    assert "9 host blocks" in executor.detail and executor.host_blocks == 9
    random = np.random.default_rng(0)
    steps = life(2, 3)
    filled: set[int] = set()
    for step in steps:
        # Half of what goes out comes back in the same step, to blocks that slot copies may read.
        free = np.setdiff1d(np.arange(64), np.append(step.block_table, step.slot_copies[:, 1] // 8))
        back = random.permutation(free)[:5]
        blocks, hosts = random.permutation(64)[:7], random.permutation(9)
        step.swap_out = np.stack((blocks, hosts[:7]), 1).astype(np.int32)
        filled.update(hosts[:7].tolist())  # what was never filled holds anything
        known = [host for host in hosts[4:].tolist() if host in filled]
        step.swap_in = np.stack((known, back[: len(known)]), 1).astype(np.int32)
    assert worst(executor, oracle, steps) < 1e-4
    pools = executor._pools.numpy()
    for layer, pool in enumerate(oracle._pools):  # type: ignore[attr-defined]
        assert np.abs(pools[layer] - pool.numpy()).max() < 1e-4
    bad = life(2, 1)[0]
    bad.swap_in = np.array([[9, 0]], np.int32)
    with pytest.raises(ExecutorError, match="swap_in"):
        executor.execute(bad)
    executor.close()


def test_a_prompt_comes_back_from_host_memory(random_engine: Path) -> None:
    """Through the scheduler, in a pool that holds one of two prompts: the second time a token is computed."""
    params = SamplingParams(max_tokens=2, temperature=0.0, fork=False)

    def answers(executor: Executor) -> list[tuple[list[int], int]]:
        engine, found = Engine(executor, LIMITS), []
        for first in (3, 103, 3):
            request = engine.submit("a", list(range(first, first + 17)), params)
            while engine.step() is not None:
                engine.scheduler.check()
            found.append((list(request.root.tokens), request.cached_tokens))
        return found

    expected = answers(load_executor(random_engine, "torch", device="cpu", num_blocks=64))
    found = answers(CudaExecutor(random_engine, dtype="float32", host_blocks=4, **{**SMALL, "num_blocks": 3}))
    assert found == expected and [cached for _, cached in found] == [0, 0, 16]


def test_graphs_serve_every_step(random_engine: Path) -> None:
    """Decoding, chunks, forks and drafts replay what was captured at load: only static memory reaches it."""
    executor = RehearsedExecutor(random_engine, dtype="float32", **SMALL)
    oracle = load_executor(random_engine, "torch", device="cpu", num_blocks=64)
    plain, drafts = len(executor._buckets.plain), len(executor._buckets.drafts(chains=False))
    assert executor.rehearsal.recorded == plain
    executor.expect_drafts(chains=False)
    executor.expect_drafts(chains=False)
    assert executor.rehearsal.recorded == plain + drafts
    steps = life(8, 5)
    small = [step for step in steps if step.input_ids.size <= LIMITS.max_step_tokens]
    masked = [step for step in small if step.tree_mask.shape[1]]
    assert len(steps) > len(small) > len(masked) == 2 and sum(step.slot_copies.size > 0 for step in small) == 2
    assert worst(executor, oracle, steps) < 1e-4
    assert executor.rehearsal.replayed == len(small)


def test_a_step_larger_than_expected_still_runs(random_engine: Path) -> None:
    """In memory of its own: graphs go on with theirs."""
    executor = RehearsedExecutor(
        random_engine, dtype="float32", device="cpu", num_blocks=64, max_rows=1, max_step_tokens=2
    )
    oracle = load_executor(random_engine, "torch", device="cpu", num_blocks=64)
    first = life(4, 1)[0]
    assert first.input_ids.size > 2
    assert worst(executor, oracle, [first]) < 1e-4
    assert executor.rehearsal.replayed == 0
    single = life(4, 1)[0]
    for name in ("input_ids", "position_ids", "slot_mapping"):
        setattr(single, name, getattr(first, name)[:1])
    single.tree_mask, single.query_start = first.tree_mask[:1, :0], np.array([0, 1], np.int32)
    single.kv_len, single.block_table = first.position_ids[:1] + 1, first.block_table[:1]
    single.slot_copies, single.prefix_rows, single.prefix_blocks = (
        first.slot_copies[:0],
        np.array([0, 1], np.int32),
        np.zeros(1, np.int32),
    )
    single.logits_rows = np.zeros(1, np.int32)
    assert worst(executor, oracle, [single]) < 1e-4
    assert executor.rehearsal.replayed == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_foreseen_step_is_sent_as_any_other(seed: int) -> None:
    """To the last byte; and a step that was not the foreseen one has its own plan."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 40))
    step = decode_step(rows, int(random.integers(150, 900)), 16, 300, requests=max(1, rows // 3))
    step.prefix_blocks[np.diff(step.prefix_rows) > 1] = 9
    bucket = Buckets(64, 128).find(rows, rows, rows, 0)
    assert bucket is not None
    operator = ForkAttention(num_heads=8, num_kv_heads=2, head_dim=64, block_size=16, inv_freq=torch.zeros(32))
    layout = Layout(bucket, operator.sizes(bucket.tokens, bucket.rows, bucket.groups), 64)
    plain, ahead = (StepBuffers(layout.size, 16, torch.device("cpu")) for _ in range(2))
    before = dataclasses.replace(step, kv_len=step.kv_len - 1)
    other = dataclasses.replace(step, kv_len=step.kv_len + np.arange(rows, dtype=np.int32) + 1)
    for sent, foreseen in ((step, 1), (other, 1)):
        ahead.foresee(layout, before)
        for buffers in (plain, ahead):
            buffers.send(layout, sent)
        for name, array in plain.tensors(layout).items():
            assert torch.equal(array, ahead.tensors(layout)[name]), name
        assert ahead.foreseen_plans == foreseen and plain.foreseen_plans == 0


def test_plans_are_made_ahead(tiny: Path) -> None:
    """Decoding goes on as foreseen, and whoever is wrong about it plans again."""
    executor = RehearsedExecutor(tiny, dtype="float32", **SMALL)
    expected = generate(load_executor(tiny, "torch", device="cpu", num_blocks=64), 6)
    assert generate(executor, 6) == expected
    assert executor.foreseen_plans >= 3


def test_idle_steps_write_nothing(random_engine: Path) -> None:
    """What graphs are captured with: a bucket of padding alone."""
    executor = CudaExecutor(random_engine, dtype="float32", **SMALL)
    layout = executor._layout(Bucket(2, 1, 1))
    with torch.inference_mode():
        executor._memory.buffers.send(layout, idle_step(layout))
        executor._forward(layout, executor._memory)
    assert not executor._pools.any() and torch.isfinite(executor._memory.logits[:1]).all()


def test_bad_ids_change_nothing(random_engine: Path) -> None:
    executor = CudaExecutor(random_engine, dtype="float32", **SMALL)
    step = life(5, 1)[0]
    step.block_table[0, 0] = 64
    with pytest.raises(ExecutorError, match="block_table"):
        executor.execute(step)
    assert not executor._pools.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "16bit"),
        ({"weights": "bf16", "dtype": "float16"}, "give one of the two"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"max_rows": 0}, "max_rows"),
    ],
)
def test_options_that_do_not_exist(random_engine: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        CudaExecutor(random_engine, device="cpu", **options)


def test_devices_that_are_not_there(random_engine: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ExecutorError, match="no CUDA device"):
            load_executor(random_engine, "torch", device="cuda")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            "on cpu: Failed.* apt-get install gcc python3",
        ),
        (subprocess.CalledProcessError(1, ["gcc"]), "apt-get install gcc python3-dev"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "update NVIDIA's driver"),
        (OutOfResources(155648, 101376, "shared memory"), "out of resource: shared memory.*device='cpu'"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "illegal memory access"),
    ],
    ids=["no compiler", "no headers", "old driver", "small GPU", "access"],
)
def test_what_triton_and_cuda_refuse_is_told(random_engine: Path, error: Exception, message: str) -> None:
    """At load, where a user meets it first, and in a step."""

    class Refused(CudaExecutor):
        def _make_memory(self, layouts: list[Layout]) -> StepMemory:
            raise error

    class Refusing(CudaExecutor):
        def _forward(self, layout: Layout, memory: StepMemory) -> None:
            raise error

    with pytest.raises(ExecutorError, match=message):
        Refused(random_engine, dtype="float32", **SMALL)
    with pytest.raises(ExecutorError, match="the step failed on the GPU"):
        Refusing(random_engine, dtype="float32", **SMALL).execute(life(3, 1)[0])


def test_device_numbers(random_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExecutorError, match="no device 'gpu'"):
        CudaExecutor(random_engine, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ExecutorError, match="no cuda:2: PyTorch sees 2 GPUs"):
        CudaExecutor(random_engine, device="cuda:2")


def test_everything_runs_on_the_device_that_was_named(random_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton, streams and graphs go by the thread's current device, whichever tensors they are given."""
    entered: list[str] = []

    class Watched(RehearsedExecutor):
        @contextmanager
        def _on_device(self) -> Iterator[None]:
            entered.append("in")
            yield
            entered.append("out")

        def _forward(self, layout: Layout, memory: StepMemory) -> None:
            assert entered[-1] == "in"
            super()._forward(layout, memory)

    executor = Watched(random_engine, dtype="float32", **SMALL)
    executor.execute(life(3, 1)[0])
    executor.expect_drafts(chains=True)
    assert entered == ["in", "out"] * 3


def test_heads_that_no_kernel_takes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "head_dim", dtype=torch.float32)
    onnx_engine.build(tmp_path / "checkpoint", tmp_path / "engine", block_size=8)
    with pytest.raises(ExecutorError, match="head_dim 64, 80, 96, 128"):
        CudaExecutor(tmp_path / "engine", **SMALL)


@pytest.mark.parametrize(("rows", "tokens"), [(256, 1024), (1, 2), (100, 300), (512, 2048)])
def test_every_step_has_a_bucket(rows: int, tokens: int) -> None:
    buckets = Buckets(rows, tokens)
    assert len(buckets.plain) == len(set(buckets.plain)) < 60
    assert 0 < len(buckets.drafts(chains=True)) < len(buckets.drafts(chains=False)) <= 4 * len(DRAFT_STEPS)
    random = np.random.default_rng(0)
    for _ in range(300):
        r = int(random.integers(1, rows + 1))
        t = int(random.integers(r, tokens + 1))
        bucket = buckets.find(t, r, r, 0)
        assert bucket is not None and bucket.tokens >= t and bucket.rows >= r <= bucket.wanted
        assert bucket.large_tile == (t > 2 * r)
        if not bucket.large_tile:
            assert bucket.tokens <= max(8, 2.1 * t)
        words = int(random.integers(0, DRAFT_WORDS + 1)) if t > r else 1
        bucket = buckets.find(t, r, t, words)
        if t > DRAFT_STEPS[-1]:
            assert bucket is None
        else:
            assert bucket is not None and bucket.tokens >= t and bucket.rows >= r and bucket.wanted >= t
            assert bucket.large_tile == (t > 8 * r) and bucket.mask_words == (DRAFT_WORDS if words else 0)
    assert buckets.find(rows, rows, rows, DRAFT_WORDS + 1) is None
    assert buckets.find(tokens + 1, rows, rows, 0) is None
    assert buckets.find(1, 1, 1, 0) == Bucket(1, 1, 1)
