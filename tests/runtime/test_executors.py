"""Every executor against transformers, and against each other, over random steps of the contract."""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint
from step_builder import Books, Row, Step, random_steps
from transformers import LlamaForCausalLM

from apar import plugins
from apar.export.errors import AparError, EngineError, ExecutorError, PluginError
from apar.export.manifest import GRAPH_NAME, PORTABLE_GRAPH_NAME, Manifest
from apar.export.onnx_engine import build
from apar.runtime.executor import Executor, load_executor
from apar.runtime.executor.pool import pool_blocks
from apar.runtime.executor.threads import default_threads
from apar.runtime.step import StepInputs

BLOCKS, SIZE, WORDS = 80, 8, 260
EXACT = 1e-4
"""Float32 against float32: only the order of additions differs (seen: 5e-6 on logits of about 3)."""
FLOAT16_POOL = 2e-2
"""Keys and values rounded to 11 bits (seen: 4e-3)."""
INT8_ACTIVATIONS = 0.25
"""MatMulNBits, and Linear with int4, round activations to int8 by group; the reference does not (seen: 0.14)."""
INT16_ACTIVATIONS = 2e-3
"""Linear with int8 rounds activations to 16 bits."""

# Built from the sources on this platform, so a missing library is a failure there and not a reason to skip.
NATIVE_EXPECTED = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
native_only = pytest.mark.skipif(
    not NATIVE_EXPECTED and not any(path.is_file() for path in plugins._candidates()),
    reason="the native library is not built on this platform",
)
EXECUTORS = [
    pytest.param("torch", {}, id="torch"),
    pytest.param("onnx", {"graph": "native", "spinning": False}, id="native", marks=native_only),
    pytest.param("onnx", {"graph": "portable", "spinning": False}, id="portable"),
]


@dataclass
class Model:
    """A checkpoint's engine and the logits that transformers gives for paths."""

    engine: Path
    reference: LlamaForCausalLM
    known: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def expect(self, paths: list[list[int]]) -> np.ndarray:
        for path in sorted(paths, key=len, reverse=True):
            if tuple(path) not in self.known:
                with torch.inference_mode():
                    logits = self.reference(torch.tensor([path])).logits[0].numpy()
                self.known.update((tuple(path[: end + 1]), row) for end, row in enumerate(logits))
        return np.array([self.known[tuple(path)] for path in paths])


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Model]:
    made: dict[tuple, Model] = {}

    class Models(dict):
        def __missing__(self, key: tuple) -> Model:
            variant, *options = key
            folder = tmp_path_factory.mktemp(variant)
            settings = dict(options)
            dtype = getattr(torch, settings.get("dtype", "float32"))
            reference = make_checkpoint(folder / "checkpoint", variant, dtype=dtype)
            build(folder / "checkpoint", folder / "engine", block_size=SIZE, **settings)
            self[key] = Model(folder / "engine", reference)
            return self[key]

    return Models(made)


def worst_difference(model: Model, executor: Executor, seeds: range, steps: int = 10) -> float:
    """Largest deviation of any logit from transformers' over random lives of branches."""
    worst = 0.0
    for seed in seeds:
        for step in lives(seed, steps):
            logits = executor.execute(step.inputs)
            assert logits.dtype == np.float32
            worst = max(worst, float(np.abs(logits - model.expect(step.paths)).max()))
    return worst


def lives(seed: int, steps: int) -> Iterator[Step]:
    return random_steps(seed, vocab_size=WORDS, num_blocks=BLOCKS, block_size=SIZE, steps=steps)


def prompt(books: Books, length: int, start: int = 3) -> Row:
    return Row(books.add(range(start, start + length)), length)


def test_random_steps_cover_the_contract() -> None:
    steps = list(itertools.chain.from_iterable(lives(seed, 10) for seed in range(2)))
    assert any(step.inputs.slot_copies.size for step in steps)
    assert any(step.inputs.tree_mask.size for step in steps)
    assert any((step.inputs.slot_mapping < 0).any() for step in steps)
    assert any((step.inputs.prefix_blocks > 0).any() for step in steps)
    assert any(len(set(np.diff(step.inputs.query_start))) > 2 for step in steps)


@pytest.mark.parametrize(("name", "options"), EXECUTORS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "hidden", "ffn", "vocab"),
    [(3, 1, 10, 60, 77, 271), (1, 1, 256, 8, 7, 264), (12, 2, 6, 96, 33, 333), (5, 5, 112, 40, 1, 265)],
)
def test_sizes_that_fill_no_vector_equal_transformers(
    name: str,
    options: dict,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    ffn: int,
    vocab: int,
    tmp_path: Path,
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    reference = make_checkpoint(
        tmp_path / "checkpoint", hidden_size=hidden, intermediate_size=ffn, vocab_size=vocab, **sizes
    )
    build(tmp_path / "checkpoint", tmp_path / "engine", block_size=SIZE)
    executor = load_executor(tmp_path / "engine", name, num_blocks=BLOCKS, **options)
    assert worst_difference(Model(tmp_path / "engine", reference), executor, range(1)) <= EXACT
    executor.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "options"), EXECUTORS)
def test_logits_match_transformers(models: dict, variant: str, name: str, options: dict) -> None:
    model = models[(variant,)]
    executor = load_executor(model.engine, name, num_blocks=BLOCKS, **options)
    assert worst_difference(model, executor, range(2)) <= EXACT
    executor.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "options"), EXECUTORS)
def test_narrow_weights_are_computed_in_float32(models: dict, dtype: str, name: str, options: dict) -> None:
    model = models[("gqa", ("dtype", dtype), ("kv_dtype", "float32"))]
    executor = load_executor(model.engine, name, num_blocks=BLOCKS, **options)
    assert worst_difference(model, executor, range(1)) <= EXACT


@pytest.mark.parametrize("variant", ["mha", "gqa"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("onnx", {"graph": "native"}, id="native", marks=native_only),
        pytest.param("torch", {"kv_dtype": "float16"}, id="torch"),
    ],
)
def test_float16_pools(models: dict, variant: str, name: str, options: dict) -> None:
    model = models[(variant, ("kv_dtype", "float16"))]
    executor = load_executor(model.engine, name, num_blocks=BLOCKS, **options)
    assert "float16" in executor.detail
    assert EXACT < worst_difference(model, executor, range(1)) <= FLOAT16_POOL


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@native_only
def test_quantised_engines_agree(models: dict, quantize: str) -> None:
    model = models[("gqa", ("quantize", quantize), ("kv_dtype", "float32"))]
    executors = [
        load_executor(model.engine, param.values[0], num_blocks=BLOCKS, **param.values[1]) for param in EXECUTORS
    ]
    for step in lives(0, 10):
        reference, native, portable = (executor.execute(step.inputs).copy() for executor in executors)
        limit = INT16_ACTIVATIONS if quantize == "int8" else INT8_ACTIVATIONS
        assert np.abs(native - reference).max() <= limit
        assert np.abs(portable - reference).max() <= INT8_ACTIVATIONS
        assert np.sqrt(np.mean((native - reference) ** 2)) <= limit / 4
        assert np.sqrt(np.mean((portable - reference) ** 2)) <= INT8_ACTIVATIONS / 4


@pytest.mark.parametrize(("name", "options"), EXECUTORS)
class TestOneExecutor:
    @pytest.fixture
    def model(self, models: dict) -> Model:
        return models[("gqa",)]

    @pytest.fixture
    def executor(self, model: Model, name: str, options: dict) -> Iterator[Executor]:
        executor = load_executor(model.engine, name, num_blocks=BLOCKS, **options)
        yield executor
        executor.close()

    def test_describes_itself(self, executor: Executor, name: str, model: Model) -> None:
        assert executor.name == name
        assert executor.num_blocks == BLOCKS
        assert executor.manifest == Manifest.load(model.engine)
        assert "80 blocks of 8" in executor.detail

    def test_copies_read_all_sources_first(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        first, second = (prompt(books, SIZE, start) for start in (3, 90))
        executor.execute(books.step([first, second]).inputs)
        first.branch.blocks, second.branch.blocks = second.branch.blocks, first.branch.blocks
        for index in range(SIZE):
            slots = books.slot(first.branch, index), books.slot(second.branch, index)
            books.copies += [slots, slots[::-1]]
        for row in (first, second):
            row.branch.tokens.append(200)
        step = books.step([Row(first.branch, 1), Row(second.branch, 1)])
        assert np.abs(executor.execute(step.inputs) - model.expect(step.paths)).max() <= EXACT

    def test_a_write_wins_over_a_copy_to_its_slot(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        row = prompt(books, 3)
        executor.execute(books.step([row]).inputs)
        row.branch.tokens.append(50)
        books.copies.append((books.slot(row.branch, 0), books.slot(row.branch, 3)))
        step = books.step([Row(row.branch, 1)])
        assert np.abs(executor.execute(step.inputs) - model.expect(step.paths)).max() <= EXACT

    def test_a_step_without_wanted_logits(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        row = prompt(books, 20)
        row.count = 9
        step = books.step([row])
        step.inputs.logits_rows = np.zeros(0, np.int32)
        assert executor.execute(step.inputs).shape == (0, 264)
        step = books.step([Row(row.branch, 11)])
        assert np.abs(executor.execute(step.inputs) - model.expect(step.paths)).max() <= EXACT

    def test_padding_alone(self, executor: Executor) -> None:
        books = Books(BLOCKS, SIZE)
        step = books.step([prompt(books, 1)], padding=2)
        step.inputs.slot_mapping[:] = -1
        assert executor.execute(step.inputs).shape[0] == 1

    def test_logits_grow_and_may_be_written(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        for length in (2, 70, 150):
            row = prompt(books, length)
            step = books.step([row])
            logits = executor.execute(step.inputs)
            assert np.abs(logits - model.expect(step.paths)).max() <= EXACT
            logits[:] = np.inf
            books.release(row.branch)

    def test_a_mask_of_more_than_one_word(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        row = prompt(books, 40)
        row.drafts = list(range(100, 110))
        row.parents = [-1, -1, 0, 1, 2, 2, 5, 6, 7, 3]
        step = books.step([row])
        assert step.inputs.tree_mask.shape[1] == 2
        assert np.abs(executor.execute(step.inputs) - model.expect(step.paths)).max() <= EXACT

    @pytest.mark.parametrize(
        ("field_name", "value"),
        [
            ("block_table", BLOCKS),
            ("block_table", -1),
            ("slot_mapping", BLOCKS * SIZE),
            ("slot_mapping", 0),
            ("input_ids", 264),
            ("logits_rows", 99),
            ("slot_copies", [[0, BLOCKS * SIZE]]),
            ("slot_copies", [[0, 8], [1, 8]]),
            ("query_start", [0, 3]),
            ("input_ids", np.zeros(5, np.int64)),
            ("input_ids", np.zeros(10, np.int32)[::2]),
        ],
    )
    def test_bad_steps_are_refused_and_do_no_harm(
        self, executor: Executor, model: Model, field_name: str, value: object
    ) -> None:
        books = Books(BLOCKS, SIZE)
        bad = books.step([prompt(books, 5)]).inputs
        if isinstance(value, np.ndarray):
            setattr(bad, field_name, value)
        elif isinstance(value, list):
            setattr(bad, field_name, np.array(value, np.int32))
        else:
            getattr(bad, field_name)[:] = value
        strided = isinstance(value, np.ndarray) and not value.flags.c_contiguous
        if strided and executor.name == "torch":
            executor.execute(bad)
        else:
            with pytest.raises(ExecutorError):
                executor.execute(bad)
        good = books.step([prompt(books, 12)])
        assert np.abs(executor.execute(good.inputs) - model.expect(good.paths)).max() <= EXACT

    def test_close_is_idempotent_and_final(self, executor: Executor) -> None:
        books = Books(BLOCKS, SIZE)
        step = books.step([prompt(books, 4)])
        executor.execute(step.inputs)
        executor.close()
        executor.close()
        with pytest.raises(ExecutorError, match="closed"):
            executor.execute(step.inputs)

    def test_bad_pool_sizes(self, model: Model, name: str, options: dict) -> None:
        for size in ({"num_blocks": 0}, {"num_blocks": -4}, {"kv_memory_bytes": 10}, {"num_blocks": 2**30}):
            with pytest.raises(ExecutorError, match="block"):
                load_executor(model.engine, name, **options, **size)

    def test_a_missing_engine(self, tmp_path: Path, name: str, options: dict) -> None:
        with pytest.raises(EngineError, match="apar build"):
            load_executor(tmp_path, name, **options)


class TestSwaps:
    """Host blocks of the torch executor; what the others do with a step that names some."""

    @pytest.fixture
    def model(self, models: dict) -> Model:
        return models[("gqa",)]

    @pytest.fixture
    def executor(self, model: Model) -> Iterator[Executor]:
        executor = load_executor(model.engine, "torch", device="cpu", num_blocks=BLOCKS, host_blocks=5)
        yield executor
        executor.close()

    def swapped(
        self, step: Step, out: Sequence[tuple[int, int]] = (), back: Sequence[tuple[int, int]] = ()
    ) -> StepInputs:
        step.inputs.swap_out, step.inputs.swap_in = (np.array(pairs, np.int32).reshape(-1, 2) for pairs in (out, back))
        return step.inputs

    def test_a_path_goes_and_comes_back_elsewhere(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        row = prompt(books, 2 * SIZE)
        executor.execute(books.step([row]).inputs)
        old, free = row.branch.blocks, [books._take() for _ in range(2)]
        # Others take its blocks in the step that copies them out.
        other = prompt(books, 2 * SIZE, 100)
        other.branch.blocks = list(old)
        step = books.step([other])
        logits = executor.execute(self.swapped(step, out=[(old[0], 4), (old[1], 1)]))
        assert np.abs(logits - model.expect(step.paths)).max() <= EXACT
        row.branch.blocks = free
        row.branch.tokens.append(200)
        step = books.step([Row(row.branch, 1)])
        logits = executor.execute(self.swapped(step, back=[(1, free[1]), (4, free[0])]))
        assert np.abs(logits - model.expect(step.paths)).max() <= EXACT

    def test_out_and_back_in_one_step(self, executor: Executor, model: Model) -> None:
        books = Books(BLOCKS, SIZE)
        row = prompt(books, 2 * SIZE)
        executor.execute(books.step([row]).inputs)
        old, row.branch.blocks = row.branch.blocks, row.branch.blocks[::-1]
        row.branch.tokens.append(200)
        step = books.step([Row(row.branch, 1)])
        swaps = self.swapped(step, out=[(old[0], 0), (old[1], 1)], back=[(0, old[1]), (1, old[0])])
        assert np.abs(executor.execute(swaps) - model.expect(step.paths)).max() <= EXACT

    def test_slot_copies_read_a_block_before_it_is_filled_from_host_memory(
        self, executor: Executor, model: Model
    ) -> None:
        books = Books(BLOCKS, SIZE)
        one, other = prompt(books, SIZE), prompt(books, SIZE, 100)
        executor.execute(books.step([one, other]).inputs)
        (kept,), (taken,), fresh = one.branch.blocks, other.branch.blocks, books._take()
        books.copies = [(taken * SIZE + i, fresh * SIZE + i) for i in range(SIZE)]
        one.branch.blocks, other.branch.blocks = [taken], [fresh]
        for row in (one, other):
            row.branch.tokens.append(200)
        step = books.step([Row(one.branch, 1), Row(other.branch, 1)])
        swaps = self.swapped(step, out=[(kept, 3)], back=[(3, taken)])
        assert np.abs(executor.execute(swaps) - model.expect(step.paths)).max() <= EXACT

    @pytest.mark.parametrize(
        ("field_name", "value", "message"),
        [
            ("swap_out", [[0, 5]], r"swap_out \(to\) holds 5..5, allowed is 0..4"),
            ("swap_out", [[0, -1]], r"swap_out \(to\)"),
            ("swap_out", [[BLOCKS, 0]], r"swap_out \(from\)"),
            ("swap_out", [[1, 2], [3, 2]], "swap_out writes a block twice"),
            ("swap_in", [[5, 0]], r"swap_in \(from\)"),
            ("swap_in", [[0, BLOCKS]], r"swap_in \(to\)"),
            ("swap_in", [[0, 7], [1, 7]], "swap_in writes a block twice"),
            ("swap_in", [[0, 1, 2]], "two columns"),
        ],
    )
    def test_bad_swaps_are_refused_and_do_no_harm(
        self, executor: Executor, model: Model, field_name: str, value: list, message: str
    ) -> None:
        books = Books(BLOCKS, SIZE)
        row = prompt(books, SIZE)
        executor.execute(books.step([row]).inputs)
        bad = books.step([prompt(books, 5)]).inputs
        # A good pair that must not have been copied when the bad one is found.
        bad.swap_in = np.array([[0, row.branch.blocks[0]]], np.int32)
        setattr(bad, field_name, np.array(value, np.int32))
        with pytest.raises(ExecutorError, match=message):
            executor.execute(bad)
        row.branch.tokens.append(200)
        good = books.step([Row(row.branch, 1)])
        assert np.abs(executor.execute(good.inputs) - model.expect(good.paths)).max() <= EXACT

    @pytest.mark.parametrize(("name", "options"), EXECUTORS)
    def test_executors_without_host_blocks_refuse(self, model: Model, name: str, options: dict) -> None:
        executor = load_executor(model.engine, name, num_blocks=BLOCKS, **options)
        books = Books(BLOCKS, SIZE)
        for swaps in ({"out": [(0, 0)]}, {"back": [(0, 0)]}):
            with pytest.raises(ExecutorError, match="offers no host blocks"):
                executor.execute(self.swapped(books.step([prompt(books, 4)]), **swaps))
        executor.close()


def test_loading_by_name(models: dict) -> None:
    engine = models[("gqa",)].engine
    executor = load_executor(engine, num_blocks=4)
    assert executor.name == "onnx"
    executor.close()
    with pytest.raises(ExecutorError, match="auto, onnx, torch"):
        load_executor(engine, "cuda")
    with pytest.raises(ExecutorError, match="blocks"):
        load_executor(engine, "torch", blocks=4)
    for options in ({"graph": "fast"}, {"threads": 0}, {"num_blocks": 2, "kv_memory_bytes": 1 << 20}):
        with pytest.raises(ExecutorError):
            load_executor(engine, "onnx", **options)
    with pytest.raises(ExecutorError, match="kv_dtype"):
        load_executor(engine, "torch", kv_dtype="int8")
    with pytest.raises(ExecutorError, match="no executor but a module"):
        load_executor(engine, "os:path")
    with pytest.raises(ExecutorError, match="made no executor but a str"):
        load_executor(engine, "builtins:str")
    with pytest.raises(ExecutorError, match="no device 'xpu'"):
        load_executor(engine, "torch", device="xpu")


@native_only
def test_auto_takes_the_native_graph(models: dict, recwarn: pytest.WarningsRecorder) -> None:
    executor = load_executor(models[("gqa",)].engine, num_blocks=BLOCKS)
    assert "native graph" in executor.detail
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


@pytest.mark.parametrize("kind", ["missing", "no library", "foreign library"])
def test_without_the_native_library(models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "library.so"
    if kind == "no library":
        path.write_bytes(b"not a library")
    elif kind == "foreign library":
        import onnxruntime.capi

        path = next(Path(onnxruntime.capi.__path__[0]).glob("libonnxruntime_providers_shared*"), path)
    monkeypatch.setenv(plugins.LIBRARY_VARIABLE, str(path))
    model = models[("gqa",)]
    with pytest.raises(PluginError, match=path.name.split(".")[0]):
        load_executor(model.engine, "onnx", graph="native")
    with pytest.warns(RuntimeWarning, match="portable graph"):
        executor = load_executor(model.engine, num_blocks=BLOCKS)
    assert "portable graph" in executor.detail and path.name in executor.detail
    assert worst_difference(model, executor, range(1), steps=3) <= EXACT


@pytest.mark.parametrize(("file", "graph"), [(PORTABLE_GRAPH_NAME, "portable"), (GRAPH_NAME, "native")])
@native_only
def test_a_damaged_graph(tmp_path: Path, file: str, graph: str) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "engine")
    path = tmp_path / "engine" / file
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(AparError, match=path.name):
        load_executor(tmp_path / "engine", "onnx", graph=graph)
    path.unlink()
    with pytest.raises(AparError, match=path.name):
        load_executor(tmp_path / "engine", "onnx", graph=graph)


def test_torch_missing(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "apar.runtime.executor.torch_executor", raising=False)
    with pytest.raises(ExecutorError, match=r"pip install 'apar\[torch\]'"):
        load_executor(models[("gqa",)].engine, "torch")


def test_default_pool_and_threads(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(models[("gqa",)].engine)
    assert pool_blocks(manifest, "float32", None, None) == 8 * 256 // SIZE
    block = manifest.decoder.kv_bytes_per_token("float16") * SIZE
    assert pool_blocks(manifest, "float16", None, 10 * block + 5) == 10
    monkeypatch.setattr("apar.runtime.executor.pool.available_memory", lambda: 4 * 3 * block)
    assert pool_blocks(manifest, "float16", None, None) == 3
    monkeypatch.setattr("apar.runtime.executor.pool.available_memory", lambda: 0)
    with pytest.raises(ExecutorError, match="memory"):
        pool_blocks(manifest, "float16", None, None)
    assert default_threads() >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's resident size as Linux tells it")
def test_a_large_pool_takes_no_memory_until_it_is_used(models: dict) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096

    before = resident()
    executor = load_executor(models[("gqa",)].engine, "onnx", graph="portable", kv_memory_bytes=2 << 30)
    books = Books(64, SIZE)
    executor.execute(books.step([prompt(books, 20)]).inputs)
    assert resident() - before < 200 << 20
    executor.close()
