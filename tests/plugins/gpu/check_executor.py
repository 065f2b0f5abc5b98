"""The executor for CUDA devices, all but its graphs, in Triton's interpreter: against the plain torch executor."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from step_builder import random_steps

from apar.export import onnx_engine
from apar.export.errors import ExecutorError
from apar.runtime.engine import Engine
from apar.runtime.engine_source import tiny_checkpoint
from apar.runtime.executor import load_executor
from apar.runtime.executor.base import Executor
from apar.runtime.executor.cuda.buckets import Bucket, Buckets
from apar.runtime.executor.cuda.executor import CudaExecutor, idle_step
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import StepInputs

LIMITS = SchedulerLimits(max_rows=4, max_step_tokens=16)
SMALL = {"device": "cpu", "num_blocks": 64, "max_rows": LIMITS.max_rows, "max_step_tokens": LIMITS.max_step_tokens}


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


def test_a_step_larger_than_expected_still_runs(random_engine: Path) -> None:
    executor = CudaExecutor(random_engine, dtype="float32", device="cpu", num_blocks=64, max_rows=1, max_step_tokens=2)
    oracle = load_executor(random_engine, "torch", device="cpu", num_blocks=64)
    assert worst(executor, oracle, life(4, 1)) < 1e-4


def test_idle_steps_write_nothing(random_engine: Path) -> None:
    """What graphs are captured with: a bucket of padding alone."""
    executor = CudaExecutor(random_engine, dtype="float32", **SMALL)
    layout = executor._known_layout(Bucket(2, 1, 1))
    with torch.inference_mode():
        executor._buffers.send(layout, idle_step(layout))
        executor._forward(layout)
    assert not executor._pools.any() and torch.isfinite(executor._logits[:1]).all()


def test_bad_ids_change_nothing(random_engine: Path) -> None:
    executor = CudaExecutor(random_engine, dtype="float32", **SMALL)
    step = life(5, 1)[0]
    step.block_table[0, 0] = 64
    with pytest.raises(ExecutorError, match="block_table"):
        executor.execute(step)
    assert not executor._pools.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": "int3"}, "16bit"), ({"dtype": "int8"}, "bfloat16"), ({"max_rows": 0}, "max_rows")],
)
def test_options_that_do_not_exist(random_engine: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        CudaExecutor(random_engine, device="cpu", **options)


def test_devices_that_are_not_there(random_engine: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ExecutorError, match="no CUDA device"):
            load_executor(random_engine, "torch", device="cuda")


def test_heads_that_no_kernel_takes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "head_dim", dtype=torch.float32)
    onnx_engine.build(tmp_path / "checkpoint", tmp_path / "engine", block_size=8)
    with pytest.raises(ExecutorError, match="head_dim 64, 80, 96, 128"):
        CudaExecutor(tmp_path / "engine", **SMALL)


@pytest.mark.parametrize(("rows", "tokens"), [(256, 1024), (1, 2), (100, 300), (512, 2048)])
def test_every_step_has_a_bucket(rows: int, tokens: int) -> None:
    buckets = Buckets(rows, tokens)
    assert len(buckets.all) == len(set(buckets.all)) < 60
    random = np.random.default_rng(0)
    for _ in range(300):
        r = int(random.integers(1, rows + 1))
        t = int(random.integers(r, tokens + 1))
        bucket = buckets.find(t, r, r, 0)
        assert bucket is not None and bucket.tokens >= t and bucket.rows >= r <= bucket.wanted
        assert bucket.mixed == (t > 2 * r)
        if not bucket.mixed:
            assert bucket.tokens <= max(8, 2.1 * t)
    assert buckets.find(rows, rows, rows, 1) is None
    assert buckets.find(tokens + 1, rows, rows, 0) is None
    assert buckets.find(1, 1, 1, 0) == Bucket(1, 1, 1)
