"""What quantisation costs in quality: engines of one checkpoint against its float32 engine, on the same prompts.

The float32 engine answers each prompt, greedily and with forks. Prompts and those answers' paths are then read by
every engine, through its real kernels: KL divergence of its distributions from the float32 engine's, the perplexity
that it gives the text, and how often its likeliest token is the same. A model is sure of its answers, and much less
of what people ask: figures of the two are kept apart. And every engine answers the prompts itself: how
many trees of branches, and how many answers, come out the same.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any

import numpy as np

from apar.export import onnx_engine
from apar.export.manifest import Manifest
from apar.runtime.bench.machine import describe_machine
from apar.runtime.calibration import CalibrationText, recorded_paths
from apar.runtime.executor.base import Executor
from apar.runtime.llm import LLM
from apar.runtime.outputs import RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, StepInputs
from apar.runtime.text_engine import Prompt

Progress = Callable[[int, int], None]
KINDS = ("prompts", "answers")


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """How one engine is quantised."""

    quantize: str
    method: str
    group_size: int
    """0: all of an output channel, which only int8 takes."""
    zero_points: bool = False

    @property
    def bits(self) -> float:
        """Bits of one weight in a layer with its share of scale (bfloat16) and zero point (a byte)."""
        bits = {"int8": 8, "int4": 4}[self.quantize]
        return bits + (16 + 8 * self.zero_points) / self.group_size if self.group_size else float(bits)


def variants(formats: Sequence[str], group_sizes: Sequence[int]) -> list[Variant]:
    """Both methods, without and with zero points, for each format and group size; int8 only rounded, also by rows."""
    found = [Variant("int8", "rtn", size) for size in (0, *group_sizes)] if "int8" in formats else []
    if "int4" in formats:
        found += [
            Variant("int4", method, size, zero_points)
            for size in group_sizes
            for zero_points in (False, True)
            for method in ("rtn", "gptq")
        ]
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """Tokens that are read: those of `path` from `start` on."""

    kind: str
    path: list[int]
    start: int

    @property
    def length(self) -> int:
        return len(self.path) - self.start

    @property
    def read(self) -> list[int]:
        return self.path[self.start :]


class QualityBench:
    """Builds the engines of a checkpoint one after another and compares each with the float32 engine.

    Args:
        checkpoint: a checkpoint directory.
        prompts: what is asked.
        calibration: text for gptq.
        max_tokens: of an answer.
        executor: name and options of the executor.
    """

    def __init__(
        self,
        checkpoint: Path,
        prompts: Sequence[Prompt],
        calibration: CalibrationText,
        max_tokens: int = 512,
        executor: str = "auto",
        **options: Any,
    ) -> None:
        self._checkpoint = checkpoint
        self._prompts = list(prompts)
        self._calibration = calibration
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
        self._executor = executor
        self._options = options

    def run(self, chosen: Sequence[Variant], progress: Progress | None = None) -> dict[str, Any]:
        """Compare; the result is what `apar bench quality --json` prints."""
        room = Path(mkdtemp(prefix="apar-quality-"))
        try:
            reference = Reference(self._engine(room, None), self._prompts, self._params)
            rows = [reference.row]
            for number, variant in enumerate(chosen, 1):
                if progress:
                    progress(number, len(chosen) + 1)
                began = perf_counter()
                llm = self._engine(room, variant)
                built = perf_counter() - began
                try:
                    row = reference.compare(llm, self._prompts, self._params)
                finally:
                    llm.close()
                shape = dataclasses.asdict(variant) | {"bits": variant.bits, "build_seconds": built}
                rows.append(shape | row)
                shutil.rmtree(llm.engine_directory)
            if progress:
                progress(len(chosen) + 1, len(chosen) + 1)
        finally:
            shutil.rmtree(room, ignore_errors=True)
        return {
            "bench": "quality",
            "checkpoint": self._checkpoint.resolve().name,
            "prompts": len(self._prompts),
            "tokens": reference.tokens,
            "forks": sum(len(answer.branches) - 1 for answer in reference.answers),
            "calibration": self._calibration.name,
            "engines": rows,
            "machine": describe_machine(),
        }

    def _engine(self, room: Path, variant: Variant | None) -> LLM:
        target = room / "engine"
        settings: dict[str, Any] = {"dtype": "float32"}
        if variant is not None:
            settings |= {
                "quantize": variant.quantize,
                "quantize_method": variant.method,
                "group_size": variant.group_size or None,
                "zero_points": variant.zero_points,
                "calibration": self._calibration if variant.method == "gptq" else None,
            }
        onnx_engine.build(self._checkpoint, target, overwrite=True, **settings)
        return LLM(target, executor=self._executor, **self._options)


class Reference:
    """The float32 engine's answers and distributions. Closes the engine."""

    def __init__(self, llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        try:
            self.answers = llm.generate(prompts, params)
            self._texts = [text for answer in self.answers for text in _texts(answer, llm.manifest)]
            self._logprobs = [_logprobs(llm.executor, text) for text in self._texts]
            size = _weight_bytes(llm.manifest)
        finally:
            llm.close()
        own = {"quantize": "none", "method": "none", "group_size": 0, "zero_points": False, "bits": 32.0}
        self.row: dict[str, Any] = own | {"build_seconds": None, "weight_bytes": size}
        self.row |= self._read(self._logprobs) | self._same(self.answers)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that are read of each kind."""
        return {kind: sum(text.length for text in self._texts if text.kind == kind) for kind in KINDS}

    def compare(self, llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, Any]:
        """Figures of another engine."""
        answers = llm.generate(prompts, params)
        logprobs = [_logprobs(llm.executor, text) for text in self._texts]
        return {"weight_bytes": _weight_bytes(llm.manifest)} | self._read(logprobs) | self._same(answers)

    def _read(self, logprobs: Sequence[Float32Array]) -> dict[str, Any]:
        """Distributions over the tokens of each kind."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            chosen = [i for i, text in enumerate(self._texts) if text.kind == kind]
            ours, theirs = (np.concatenate([logs[i] for i in chosen]) for logs in (self._logprobs, logprobs))
            tokens = np.concatenate([self._texts[i].read for i in chosen])
            divergence = (np.exp(ours) * (ours - theirs)).sum(axis=1)
            found[kind] = {
                "kl_millinats": 1e3 * float(divergence.mean()),
                "kl_millinats_p99": 1e3 * float(np.percentile(divergence, 99)),
                "perplexity": math.exp(-float(theirs[np.arange(len(tokens)), tokens].mean())),
                "same_token_percent": 100 * float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
            }
        return found

    def _same(self, answers: Sequence[RequestOutput]) -> dict[str, int]:
        pairs = list(zip(self.answers, answers, strict=True))
        return {
            "same_trees": sum(_tree(one) == _tree(other) for one, other in pairs),
            "same_answers": sum(_tokens(one) == _tokens(other) for one, other in pairs),
        }


def path_inputs(tokens: Sequence[int], first_logits: int, block_size: int) -> StepInputs:
    """A step that computes a whole path from nothing, with logits from token `first_logits` on."""
    count = len(tokens)
    array = np.array
    return StepInputs(
        input_ids=array(tokens, np.int32),
        position_ids=np.arange(count, dtype=np.int32),
        query_start=array([0, count], np.int32),
        kv_len=array([count], np.int32),
        block_table=np.arange(-(-count // block_size), dtype=np.int32)[None],
        slot_mapping=np.arange(count, dtype=np.int32),
        slot_copies=np.zeros((0, 2), np.int32),
        prefix_rows=array([0, 1], np.int32),
        prefix_blocks=array([0], np.int32),
        tree_mask=np.zeros((count, 0), np.int32),
        logits_rows=np.arange(first_logits, count, dtype=np.int32),
    )


def _texts(answer: RequestOutput, manifest: Manifest) -> list[_Text]:
    """The prompt, and every branch's own tokens."""
    branches = [dataclasses.asdict(branch) for branch in answer.branches]
    paths = recorded_paths(answer.prompt_token_ids, branches, manifest.tokens)
    own = [_Text("answers", path, start) for path, start in paths if len(path) > start]
    prompt = answer.prompt_token_ids
    return [_Text("prompts", prompt, 1), *own] if len(prompt) > 1 else own


def _logprobs(executor: Executor, text: _Text) -> Float32Array:
    """[length, vocab] log-probabilities of what could stand in the place of each token that is read."""
    logits = executor.execute(path_inputs(text.path[:-1], text.start - 1, executor.manifest.block_size))
    logits = logits - logits.max(axis=1, keepdims=True)
    logs: Float32Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logs


def _tree(answer: RequestOutput) -> list[int | None]:
    return [branch.parent_id for branch in answer.branches]


def _tokens(answer: RequestOutput) -> list[tuple[int | None, list[int]]]:
    return [(branch.parent_id, branch.token_ids) for branch in answer.branches]


def _weight_bytes(manifest: Manifest) -> int:
    return sum(size for name, size in manifest.files.items() if name.endswith(".data"))
