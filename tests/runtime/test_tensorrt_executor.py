"""The TensorRT builder and executor over doubles of TensorRT and of the CUDA driver (tensorrt_double.py).

Proven here: everything of ours between a checkpoint and TensorRT's calls, and between a step and its logits: profiles,
padding, addresses, captured graphs, checks. Not proven: TensorRT, the plugin and the kernels themselves.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorrt_double
import torch
from checkpoints import VOCAB, make_checkpoint, make_heads
from medusa_reference import expect, one_row
from portable_graph import random_tokens
from step_builder import Books, Row, random_steps
from torch import Tensor
from transformers import LlamaForCausalLM

from apar.export.errors import AparError, BuildError, EngineError, ExecutorError
from apar.export.manifest import DraftHeads, Manifest, TensorRtEngine
from apar.export.tensorrt_api import release
from apar.export.tensorrt_compile import BuildLog
from apar.export.tensorrt_engine import TensorRtOptions, build
from apar.export.tensorrt_profiles import DECODE, MIXED, ranges, shapes
from apar.plugins.cuda_driver import CudaDevice
from apar.runtime.executor import load_executor, tensorrt_graphs, tensorrt_step
from apar.runtime.executor.tensorrt_step import Staging, choose_shape, staging_bytes
from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.step import StepInputs

BLOCKS, SIZE, WORDS = 80, 8, 260
OPTIONS = TensorRtOptions(block_size=SIZE, max_rows=24, max_tokens=160)
FLOAT16 = 5e-2
"""Largest deviation of a logit, of logits of about 8 (seen: 0.018)."""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorrt_double.build_fake_cuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def double(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tensorrt_double.Double]:
    yield from tensorrt_double.installed(cuda, monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint(folder, "gqa", hidden_size=256, dtype=torch.float16, num_hidden_layers=2)
    return folder, model


@pytest.fixture(scope="module")
def engine(cuda: Path, checkpoint: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engine") / "trt"
    with pytest.MonkeyPatch.context() as patch:
        for _ in tensorrt_double.installed(cuda, patch):
            build(checkpoint[0], target, OPTIONS)
    return target


def expected(reference: torch.nn.Module, paths: list[list[int]]) -> np.ndarray:
    with torch.inference_mode():
        return np.array([reference(torch.tensor([path])).logits[0, -1].numpy() for path in paths])


# ------------------------------------------------------------------ building


def test_an_engine_directory_has_tensorrt_llms_layout_and_ours(
    checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, tmp_path: Path
) -> None:
    stages: list[tuple[str, int, int]] = []
    cache = tmp_path / "timing" / "cache"
    options = replace(OPTIONS, workspace_bytes=1 << 30, optimization_level=4, timing_cache=cache, kv_fraction=0.5)
    built = build(checkpoint[0], tmp_path / "engine", options, progress=lambda *event: stages.append(event))
    manifest = Manifest.load(tmp_path / "engine")
    assert manifest == built
    facts = manifest.tensorrt
    assert facts is not None
    assert (facts.version, facts.compute_capability, facts.device) == ("10.14.1.48", "9.0", "Fake GPU")
    assert (facts.max_rows, facts.max_tokens, facts.table_width) == (24, 160, 32)
    assert (manifest.dtype, manifest.kv_dtype, manifest.block_size) == ("float16", "float16", SIZE)
    files = {path.name for path in (tmp_path / "engine").iterdir()}
    assert {"manifest.json", "config.json", "rank0.engine", "build.log", "apar_gpu.table", "tokenizer.json"} <= files
    assert not any(name.endswith((".onnx", ".data")) for name in files)
    assert set(manifest.files) | {"manifest.json"} == files
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["pretrained_config"]["architecture"] == "LlamaForCausalLM"
    assert config["pretrained_config"]["num_key_value_heads"] == 2
    assert config["pretrained_config"]["rotary_base"] == 10000.0
    assert config["build_config"]["max_batch_size"] == 24
    assert config["build_config"]["plugin_config"]["tokens_per_block"] == SIZE
    assert config["apar"]["tensorrt"]["engine_id"] == facts.engine_id
    [settings] = double.configs
    assert settings._features == {tensorrt_double.PreviewFeature.ALIASED_PLUGIN_IO_10_03: True}
    assert settings._limits == {tensorrt_double.MemoryPoolType.WORKSPACE: 1 << 30}
    assert settings.builder_optimization_level == 4
    assert double.networks[0]._flags == 2  # strongly typed, as TensorRT 10 is told
    assert cache.read_bytes() == b"measured"
    assert "built" in (tmp_path / "engine" / "build.log").read_text()
    engine_stage = [done for stage, done, _ in stages if stage == "engine"]
    assert engine_stage == sorted(engine_stage)
    assert engine_stage[-1] == 1000
    assert len(set(engine_stage)) > 5


def test_a_bfloat16_engine_can_be_loaded(
    checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, tmp_path: Path
) -> None:
    built = build(checkpoint[0], tmp_path / "engine", replace(OPTIONS, dtype="bfloat16"))
    assert built is not None and built.kv_dtype == "bfloat16"
    assert Manifest.load(tmp_path / "engine") == built
    built.verify(tmp_path / "engine")


def test_eleven_takes_no_network_flag(
    checkpoint: tuple[Path, torch.nn.Module], cuda: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for double in tensorrt_double.installed(cuda, monkeypatch, "11.1.0.106"):
        build(checkpoint[0], tmp_path / "engine", OPTIONS)
        assert double.networks[0]._flags == 0


def test_tensorrts_reasons_are_told(
    checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, tmp_path: Path
) -> None:
    double.parser_error = "Plugin not found"
    with pytest.raises(BuildError, match="Operator node: Plugin not found"):
        build(checkpoint[0], tmp_path / "engine", OPTIONS)
    double.parser_error, double.build_error = "", "out of memory"
    with pytest.raises(BuildError, match="cannot compile the graph: out of memory"):
        build(checkpoint[0], tmp_path / "engine", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_timing_cache_that_tensorrt_does_not_take_is_replaced(
    checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"of another GPU, ")
    double.cache_refused = True
    build(checkpoint[0], tmp_path / "engine", replace(OPTIONS, timing_cache=cache))
    assert cache.read_bytes() == b"measured"
    assert "is damaged or of another GPU" in (tmp_path / "engine" / "build.log").read_text()
    double.cache_refused = False
    # What cannot be saved does not cost the engine.
    (tmp_path / "file").write_bytes(b"")
    build(checkpoint[0], tmp_path / "second", replace(OPTIONS, timing_cache=tmp_path / "file" / "cache"))
    assert "cannot be written" in (tmp_path / "second" / "build.log").read_text()


def test_messages_that_come_late_or_with_ctrl_c_do_no_harm(tmp_path: Path) -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    log = BuildLog(tensorrt_double, Interrupting())
    log.logger.log(tensorrt_double.Severity.INFO, "x")
    assert log.interrupted
    with (tmp_path / "log").open("w") as file:
        log = BuildLog(tensorrt_double, file)
    log.logger.log(tensorrt_double.Severity.ERROR, "of an object's end")
    assert log.summary() == "of an object's end"
    assert not log.interrupted


def test_a_wheels_suffix_is_no_other_version(
    engine: Path, double: tensorrt_double.Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_double, "__version__", "10.14.1.48.post1")
    load_executor(engine, "tensorrt", num_blocks=BLOCKS).close()
    assert release(SimpleNamespace(__version__="11.1.0.106")) == "11.1.0.106"
    assert release(SimpleNamespace(__version__="12.0")) == "12.0"


def test_another_gpu_of_the_same_kind_is_said(
    engine: Path, double: tensorrt_double.Double, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CudaDevice, "name", property(lambda device: "Another GPU", lambda device, name: None), False)
    load_executor(engine, "tensorrt", num_blocks=BLOCKS).close()
    assert "was built on Fake GPU and runs on Another GPU" in caplog.text


def test_ctrl_c_ends_a_build(
    checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, tmp_path: Path
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "engine":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(checkpoint[0], tmp_path / "engine", OPTIONS, progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype 'float32' is not supported in a TensorRT engine"),
        ({"block_size": 7}, "block_size 7"),
        ({"kv_binding": "else"}, "kv_binding 'else'"),
        ({"max_tokens": 40}, r"max_tokens \(40\) must be at least twice max_rows"),
        ({"kv_fraction": 0.0}, "kv_fraction 0.0"),
        ({"kv_fraction": 1e-9}, "holds no block"),
        ({"tp_size": 3}, "cannot be split over 3 ranks"),
        ({"max_tokens": 2**24}, "give max_tokens of at most 8"),
    ],
)
def test_options_that_cannot_be_are_refused(
    change: dict[str, object],
    message: str,
    checkpoint: tuple[Path, torch.nn.Module],
    double: tensorrt_double.Double,
    tmp_path: Path,
) -> None:
    with pytest.raises(BuildError, match=message):
        build(checkpoint[0], tmp_path / "engine", replace(OPTIONS, **change))  # type: ignore[arg-type]
    assert not (tmp_path / "engine").exists()


def test_a_head_size_without_kernels_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(BuildError, match="head_dim is 16, the GPU kernels have 64, 80, 96, 128"):
        build(tmp_path / "checkpoint", tmp_path / "engine", OPTIONS)


def test_a_gpu_that_is_too_old_is_refused(
    checkpoint: tuple[Path, torch.nn.Module],
    double: tensorrt_double.Double,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "75")
    with pytest.raises(BuildError, match=r"Fake GPU has compute capability 7\.5, too old for the GPU kernels"):
        build(checkpoint[0], tmp_path / "engine", OPTIONS)
    assert not (tmp_path / "engine").exists()


def test_graphs_alone_need_no_tensorrt(checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    assert build(checkpoint[0], tmp_path / "graphs", replace(OPTIONS, graph_only=True, tp_size=2)) is None
    names = {path.name for path in (tmp_path / "graphs").iterdir()}
    assert names == {"rank0.onnx", "rank0.onnx.data", "rank1.onnx", "rank1.onnx.data"}


def test_an_engine_of_each_rank_is_built(
    checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, tmp_path: Path
) -> None:
    build(checkpoint[0], tmp_path / "engine", replace(OPTIONS, tp_size=2))
    assert {"rank0.engine", "rank1.engine"} <= {path.name for path in (tmp_path / "engine").iterdir()}
    with pytest.raises(ExecutorError, match="is cut over 2 GPUs"):
        load_executor(tmp_path / "engine", "tensorrt")


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("decoding", [True, False])
def test_random_lives_of_branches_give_the_references_logits(
    engine: Path,
    checkpoint: tuple[Path, torch.nn.Module],
    double: tensorrt_double.Double,
    decoding: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not decoding:  # let all but the smallest steps run in the profile of prompts
        most = {DECODE: 4, MIXED: OPTIONS.max_tokens}
        monkeypatch.setattr(tensorrt_step, "most_tokens", lambda engine, profile: most[profile])
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS, cuda_graphs=decoding)
    try:
        for seed in range(2 if decoding else 1):
            for step in random_steps(seed, vocab_size=WORDS, num_blocks=BLOCKS, block_size=SIZE, steps=10):
                logits = executor.execute(step.inputs)
                assert logits.dtype == np.float32
                np.testing.assert_allclose(logits, expected(checkpoint[1], step.paths), rtol=0, atol=FLOAT16)
    finally:
        executor.close()
        executor.close()
    assert double.cuda.fake_cuda_allocations() == 0


def test_memory_of_prompts_logits_grows(
    engine: Path,
    checkpoint: tuple[Path, torch.nn.Module],
    double: tensorrt_double.Double,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = {DECODE: 4, MIXED: OPTIONS.max_tokens}
    monkeypatch.setattr(tensorrt_step, "most_tokens", lambda engine, profile: most[profile])
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    books = Books(BLOCKS, SIZE)
    for count in (5, 30, 12, 150):
        step = books.step([Row(books.add(range(3, 3 + count)), count)], wanted="all")
        assert step.inputs.logits_rows.size == count
        logits = executor.execute(step.inputs)
        np.testing.assert_allclose(logits, expected(checkpoint[1], step.paths), rtol=0, atol=2 * FLOAT16)
        books = Books(BLOCKS, SIZE)
    executor.close()
    assert double.cuda.fake_cuda_allocations() == 0


def test_shapes_that_come_again_are_replayed(
    engine: Path, checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double
) -> None:
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    books = Books(BLOCKS, SIZE)
    branches = [books.add(range(3 + i, 15 + i)) for i in range(3)]
    executor.execute(books.step([Row(branch, 12) for branch in branches]).inputs)
    before, replayed = double.executions, double.cuda.fake_cuda_graphs_launched()
    for number in range(14):
        for branch in branches:
            branch.tokens.append(20 + number)
        step = books.step([Row(branch, 1) for branch in branches], wanted="last")
        logits = executor.execute(step.inputs)
        np.testing.assert_allclose(logits, expected(checkpoint[1], step.paths), rtol=0, atol=FLOAT16)
    # A shape runs, runs again and is recorded, and is replayed from then on, also when paths have grown by a block.
    assert double.cuda.fake_cuda_graphs_launched() - replayed == 12
    assert double.executions - before == 3
    executor.close()


@pytest.mark.parametrize("parents", [(-1, 0, 0), (-1, 0, 1)], ids=["trees", "chains"])
def test_drafted_steps_are_replayed_too(
    engine: Path, checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double, parents: tuple[int, ...]
) -> None:
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    assert executor.memory_bound_tokens == 160
    books = Books(BLOCKS, SIZE)
    branches = [books.add(range(3 + i, 15 + i)) for i in range(3)]
    executor.execute(books.step([Row(branch, 12) for branch in branches]).inputs)
    replayed = double.cuda.fake_cuda_graphs_launched()
    for number in range(6):
        for branch in branches:
            branch.tokens.append(20 + number)
        step = books.step([Row(branch, 1, drafts=(5 + number, 6, 7), parents=parents) for branch in branches])
        assert step.inputs.tree_mask.shape[1]
        logits = executor.execute(step.inputs)
        np.testing.assert_allclose(logits, expected(checkpoint[1], step.paths), rtol=0, atol=FLOAT16)
    assert double.cuda.fake_cuda_graphs_launched() - replayed == 4
    executor.close()
    assert double.cuda.fake_cuda_allocations() == 0


def test_the_least_recent_graph_makes_room(engine: Path, double: tensorrt_double.Double) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_graphs, "MAX_GRAPHS", 2)
        executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
        books = Books(BLOCKS, SIZE)
        branches = [books.add([5, 6, 7]) for _ in range(4)]
        executor.execute(books.step([Row(branch, 3) for branch in branches]).inputs)
        for count in (1, 2, 4, 1):
            before = double.cuda.fake_cuda_graphs_launched()
            for _ in range(3):
                for branch in branches[:count]:
                    branch.tokens.append(9)
                executor.execute(books.step([Row(branch, 1) for branch in branches[:count]]).inputs)
            # One row's graph had made room for four rows', and is learnt anew.
            assert double.cuda.fake_cuda_graphs_launched() - before == 1
        executor.close()


def test_an_engine_that_cannot_be_captured_runs_without_graphs(
    engine: Path,
    checkpoint: tuple[Path, torch.nn.Module],
    double: tensorrt_double.Double,
    caplog: pytest.LogCaptureFixture,
) -> None:
    double.capture_error = True
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    replayed = double.cuda.fake_cuda_graphs_launched()
    books = Books(BLOCKS, SIZE)
    branch = books.add([5, 6, 7])
    executor.execute(books.step([Row(branch, 3)]).inputs)
    for token in range(10, 20):
        branch.tokens.append(token)
        step = books.step([Row(branch, 1)])
        np.testing.assert_allclose(
            executor.execute(step.inputs), expected(checkpoint[1], step.paths), rtol=0, atol=FLOAT16
        )
    executor.close()
    assert double.cuda.fake_cuda_graphs_launched() == replayed
    assert caplog.text.count("steps run without CUDA graphs") == 1


def test_the_server_loop_runs_on_it(engine: Path, double: tensorrt_double.Double) -> None:
    with LLM(engine, num_blocks=BLOCKS) as llm:  # "auto" finds the executor by the manifest
        [answer] = llm.generate("Hi", SamplingParams(max_tokens=12, seed=1))
    assert answer.usage.completion_tokens > 0


def test_steps_that_are_too_large_are_refused(engine: Path, double: tensorrt_double.Double) -> None:
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    books = Books(BLOCKS, SIZE)
    with pytest.raises(ExecutorError, match="the step has 25 rows, the engine was built for 24"):
        executor.execute(books.step([Row(books.add([5]), 1) for _ in range(25)]).inputs)
    with pytest.raises(ExecutorError, match="161 tokens"):
        executor.execute(books.step([Row(books.add([5] * 161), 161)]).inputs)
    books = Books(BLOCKS, SIZE)
    branch = books.add([5] * 300)
    with pytest.raises(ExecutorError, match="a path has more than 32 blocks"):
        for count in (150, 150):
            executor.execute(books.step([Row(branch, count)]).inputs)
    executor.close()


def test_a_failed_step_does_not_end_the_executor(
    engine: Path, checkpoint: tuple[Path, torch.nn.Module], double: tensorrt_double.Double
) -> None:
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    books = Books(BLOCKS, SIZE)
    double.execution_error = True
    with pytest.raises(ExecutorError, match="the step failed in TensorRT"):
        executor.execute(books.step([Row(books.add([5, 6]), 2)]).inputs)
    double.execution_error = False
    step = books.step([Row(books.add([7, 8, 9]), 3)])
    np.testing.assert_allclose(executor.execute(step.inputs), expected(checkpoint[1], step.paths), rtol=0, atol=FLOAT16)
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.execute(step.inputs)


@pytest.fixture
def breaking(double: tensorrt_double.Double) -> Iterator[tensorrt_double.Double]:
    yield double
    double.cuda.fake_cuda_break(0)


def test_a_gpu_that_failed_can_be_closed(engine: Path, breaking: tensorrt_double.Double) -> None:
    """After an illegal access a CUDA context refuses everything, freeing too."""
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    step = Books(BLOCKS, SIZE)
    breaking.cuda.fake_cuda_break(700)
    with pytest.raises(ExecutorError, match="the step failed on the GPU: cuStreamSynchronize failed: CUDA_ERROR_FAKE"):
        executor.execute(step.step([Row(step.add([5, 6]), 2)]).inputs)
    executor.close()
    # And where it failed while an engine is loaded, that is what is said.
    with pytest.raises(ExecutorError, match=r"cannot be loaded on Fake GPU: .*CUDA_ERROR_FAKE"):
        load_executor(engine, "tensorrt", num_blocks=BLOCKS)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto", 0])
def test_devices_have_the_names_of_other_executors(
    device: str | int, engine: Path, double: tensorrt_double.Double
) -> None:
    load_executor(engine, device=device, num_blocks=BLOCKS).close()


@pytest.mark.parametrize(
    ("device", "message"),
    [("cpu", "runs on cuda or cuda:N, not on 'cpu'"), ("", "not on ''"), ("cuda:7", "there is no GPU 7")],
)
def test_other_devices_are_refused(device: str, message: str, engine: Path, double: tensorrt_double.Double) -> None:
    with pytest.raises(AparError, match=message):
        load_executor(engine, device=device, num_blocks=BLOCKS)


# ------------------------------------------------------------------ Medusa heads


@pytest.fixture(scope="module")
def drafting(cuda: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("drafting")
    model = make_checkpoint(folder / "checkpoint", "gqa", hidden_size=256, dtype=torch.float16)
    heads = make_heads(folder / "checkpoint" / "medusa", hidden=256)
    with pytest.MonkeyPatch.context() as patch:
        for _ in tensorrt_double.installed(cuda, patch):
            build(folder / "checkpoint", folder / "engine", OPTIONS)
    return folder / "engine", model, heads


def test_heads_are_an_engine_of_their_own(
    drafting: tuple[Path, LlamaForCausalLM, dict[str, Tensor]], double: tensorrt_double.Double
) -> None:
    engine, model, heads = drafting
    manifest = Manifest.load(engine)
    assert manifest.draft_heads == DraftHeads(3, 2)
    assert "rank0_medusa.engine" in manifest.files
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    with pytest.raises(ExecutorError, match="not loaded"):
        executor.draft_logits(np.zeros(1, np.int64))
    held = double.cuda.fake_cuda_allocations()
    executor.load_draft_heads()
    executor.load_draft_heads()
    tokens = random_tokens(20)
    definition = expect(model, heads, tokens).numpy()
    # A prompt, then decoding steps: run, recorded and replayed; the heads read what each of them left.
    executor.execute(one_row(tokens[:14], [3, 13, 7], SIZE))
    found = executor.draft_logits(np.array([1, 2, 1]))
    np.testing.assert_allclose(found, definition[[13, 7, 13]], rtol=0, atol=FLOAT16)
    for place in range(14, 20):
        executor.execute(continued(tokens, place))
        found = executor.draft_logits(np.zeros(1, np.int64))
        np.testing.assert_allclose(found, definition[[place]], rtol=0, atol=FLOAT16)
    assert double.cuda.fake_cuda_graphs_launched() > 0
    assert executor.draft_logits(np.zeros(0, np.int64)).shape == (0, 3, VOCAB)
    with pytest.raises(ExecutorError, match="draft logits of 25 tokens are wanted, the engine was built for 24"):
        executor.draft_logits(np.zeros(25, np.int64))
    assert double.cuda.fake_cuda_allocations() > held
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.load_draft_heads()
    assert double.cuda.fake_cuda_allocations() == 0


def continued(tokens: list[int], place: int) -> StepInputs:
    """The token at `place` alone; those before it are in the pool."""
    step = one_row(tokens[: place + 1], [0], SIZE)
    first = {name: getattr(step, name)[place:] for name in ("input_ids", "position_ids", "slot_mapping", "tree_mask")}
    return replace(step, query_start=np.array([0, 1], np.int32), **first)


def test_drafts_of_the_heads_keep_the_answer(
    drafting: tuple[Path, LlamaForCausalLM, dict[str, Tensor]], double: tensorrt_double.Double
) -> None:
    settings = SamplingParams(max_tokens=24, temperature=0.0, seed=1)
    with LLM(drafting[0], num_blocks=BLOCKS) as llm:
        [plain] = llm.generate("Hi", settings)
    with LLM(drafting[0], num_blocks=BLOCKS, draft=DraftOptions("medusa")) as llm:
        [drafted] = llm.generate("Hi", settings)
    assert drafted.text == plain.text


def test_engines_without_heads_say_so(
    engine: Path,
    drafting: tuple[Path, LlamaForCausalLM, dict[str, Tensor]],
    double: tensorrt_double.Double,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    with pytest.raises(ExecutorError, match="has no Medusa heads"):
        executor.load_draft_heads()
    executor.close()
    checkpoint = drafting[0].parent / "checkpoint"
    manifest = build(checkpoint, tmp_path / "none", OPTIONS, draft_heads="none")
    assert manifest is not None
    assert manifest.draft_heads is None
    assert build(checkpoint, tmp_path / "ranks", replace(OPTIONS, graph_only=True, tp_size=2)) is None
    assert "engines of several ranks have no Medusa heads" in caplog.text
    with pytest.raises(BuildError, match="Medusa heads are built for one rank only"):
        build(checkpoint, tmp_path / "x", replace(OPTIONS, tp_size=2), draft_heads=checkpoint / "medusa")


# ------------------------------------------------------------------ loading


def test_another_tensorrt_gpu_or_file_is_refused(
    engine: Path, double: tensorrt_double.Double, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt_double, "__version__", "10.16.0.72")
    with pytest.raises(ExecutorError, match=r"built with TensorRT 10\.14\.1\.48, but 10\.16\.0\.72 is installed"):
        load_executor(engine, "tensorrt")
    monkeypatch.setattr(tensorrt_double, "__version__", "10.14.1.48")
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    with pytest.raises(ExecutorError, match=r"capability 9\.0\), but GPU 0 is Fake GPU \(8\.0\)"):
        load_executor(engine, "tensorrt")
    monkeypatch.delenv("FAKE_CUDA_CAPABILITY")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in engine.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    size = (damaged / "rank0.engine").stat().st_size
    (damaged / "rank0.engine").write_bytes(bytes(size))
    with pytest.raises(ExecutorError, match="magic number mismatch"):
        load_executor(damaged, "tensorrt")
    (damaged / "rank0.engine").write_bytes(bytes(size - 1))
    with pytest.raises(EngineError, match=r"rank0\.engine has"):
        load_executor(damaged, "tensorrt")
    assert double.cuda.fake_cuda_allocations() == 0


def test_pools_that_tensorrt_copies_are_found_at_load(engine: Path, double: tensorrt_double.Double) -> None:
    class Copies(tensorrt_double.Library):
        def counters(self) -> tuple[int, int]:
            return double.layers_run, double.layers_run

    from apar.runtime.executor import tensorrt_executor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_executor, "load_plugins", lambda trt: Copies())
        with pytest.raises(
            ExecutorError, match="copies the KV pools in every step; build the engine again with --kv-binding bound"
        ):
            load_executor(engine, "tensorrt", num_blocks=BLOCKS)
    assert double.cuda.fake_cuda_allocations() == 0


def test_without_tensorrt_the_remedy_is_said(engine: Path) -> None:
    with pytest.raises(Exception, match="TensorRT's Python package cannot be used here"):
        load_executor(engine, "tensorrt")


def test_an_engine_of_another_kind_is_refused(tiny_engine: Path, engine: Path) -> None:
    with pytest.raises(ExecutorError, match="is no TensorRT engine"):
        load_executor(tiny_engine, "tensorrt")
    with pytest.raises(ExecutorError, match="is a TensorRT engine"):
        load_executor(engine, "onnx")


# ------------------------------------------------------------------ profiles and padding


FACTS = TensorRtEngine("10.14.1.48", "9.0", "GPU", 24, 160, 500, 32, 24 * SIZE + 160, 0.9)


def test_every_padded_step_fits_its_profile() -> None:
    staging = Staging(np.zeros(staging_bytes(FACTS), np.uint8))
    seen = set()
    for seed in range(6):
        for step in random_steps(seed, vocab_size=WORDS, num_blocks=BLOCKS, block_size=SIZE, steps=12):
            shape = choose_shape(step.inputs, FACTS, mixed=seed % 2 == 1)
            seen.add(shape.profile)
            offsets, size = staging.fill(step.inputs, shape)
            assert size <= staging_bytes(FACTS)
            assert all(offset % 256 == 0 for offset in offsets.values())
            symbols = ranges(FACTS, shape.profile)
            for name, dims in DIMENSIONS.items():
                low, _, high = shapes(dims, symbols)
                actual = shape.shapes()[name]
                assert all(a <= s <= b for a, s, b in zip(low, actual, high, strict=True)), (name, actual, low, high)
    assert seen == {DECODE, MIXED}


DIMENSIONS: dict[str, tuple[int | str, ...]] = {
    "input_ids": ("T",), "position_ids": ("T",), "query_start": ("R_plus_1",), "kv_len": ("R",),
    "block_table": ("R", "MB"), "slot_mapping": ("T",), "slot_copies": ("C", 2), "prefix_rows": ("G_plus_1",),
    "prefix_blocks": ("G",), "tree_mask": ("M", "W"), "logits_rows": ("L",),
}  # fmt: skip


def test_padding_is_harmless() -> None:
    books = Books(BLOCKS, SIZE)
    parents = [books.add(range(3, 3 + 19)) for _ in range(3)]
    books.step([Row(branch, 19) for branch in parents])
    children = [books.fork(parents[0], [1, 2]) for _ in range(2)]
    for branch in parents:
        branch.tokens.append(9)
    inputs = books.step([*(Row(b, 1) for b in parents), *(Row(b, 2) for b in children)], wanted="last").inputs
    shape = choose_shape(inputs, FACTS)
    memory = np.zeros(staging_bytes(FACTS), np.uint8)
    offsets, _ = Staging(memory).fill(inputs, shape)

    def view(name: str) -> np.ndarray:
        size = shape.shapes()[name]
        return memory[offsets[name] :][: 4 * int(np.prod(size))].view(np.int32).reshape(size)

    rows, tokens = inputs.kv_len.size, inputs.input_ids.size
    assert (rows, tokens) == (5, 7)
    assert (shape.rows, shape.tokens, shape.profile) == (8, 8, DECODE)
    assert view("query_start").tolist() == [*inputs.query_start, 8, 8, 8]
    assert (view("slot_mapping")[tokens:] == -1).all()
    copies = inputs.slot_copies.shape[0]
    assert copies == 2 * (19 % SIZE)
    np.testing.assert_array_equal(view("slot_copies")[2 : 2 + copies], inputs.slot_copies)
    assert (view("slot_copies")[2 + copies :] == inputs.slot_copies[-1]).all()
    assert np.diff(view("prefix_rows")).tolist()[: inputs.prefix_blocks.size] == np.diff(inputs.prefix_rows).tolist()
    assert (np.diff(view("prefix_rows"))[inputs.prefix_blocks.size :] == 0).all()
    assert (view("block_table")[rows:] == -1).all()
    assert view("logits_rows")[: inputs.logits_rows.size].tolist() == inputs.logits_rows.tolist()


@pytest.mark.parametrize("profile", [DECODE, MIXED])
def test_profiles_are_ranges(profile: int) -> None:
    for low, usual, high in ranges(replace(FACTS, max_rows=1, max_tokens=2), profile).values():
        assert 1 <= low <= usual <= high


# ------------------------------------------------------------------ the check for a machine with a GPU


def test_the_check_script_compares_every_step(
    double: tensorrt_double.Double, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import check_tensorrt

    assert check_tensorrt.main(["--max-tokens", "40", "-o", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["steps"] > 20
    assert report["steps_with_copies"] > 0
    assert report["steps_with_draft_trees"] > 5
    assert 0 < report["largest_difference_of_drafts"] < 0.1
    assert 0 < report["largest_difference"] < 0.1
    assert check_tensorrt.main(["--max-tokens", "2", "--tolerance", "0"]) == 1
    double.parser_error = "Plugin not found"
    assert check_tensorrt.main([]) == 1
    assert "Plugin not found" in capsys.readouterr().err
