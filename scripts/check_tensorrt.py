#!/usr/bin/env python3
"""Build a TensorRT engine on this GPU and hold every step of it against ONNX Runtime on the CPU.

    python scripts/check_tensorrt.py                        # the shipped tiny model, which forks by itself
    python scripts/check_tensorrt.py ./checkpoint --dtype bfloat16 --kv-binding bound -o report.json

The same prompts go through the real scheduler, once plainly and, where the checkpoint has Medusa heads, once with
drafts. Each step runs on both executors, and the CPU's logits decide what comes next. Prints one JSON object and exits
with 1 where logits, or draft logits, differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from apar.export import onnx_engine, tensorrt_engine
from apar.export.errors import AparError
from apar.export.manifest import Manifest
from apar.export.typed_graph import KV_BINDINGS
from apar.runtime.engine import Engine
from apar.runtime.engine_source import tiny_checkpoint
from apar.runtime.executor import Executor, load_executor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.step import Float32Array, IntArray, StepInputs
from apar.runtime.text_engine import TextEngine
from apar.runtime.tokenizer import Tokenizer

PROMPTS = (
    "Give me four facts about owls.",
    "Tell me about the violin.",
    "What are three ways to learn a language?",
    "Give me five tips for growing tomatoes.",
)
TOLERANCE = {"float16": 0.1, "bfloat16": 0.8}
"""Of a logit; the tiny model's logits reach about 20."""


class TwinExecutor(Executor):
    """Runs each step on two executors, notes how far they are apart, and returns what the first says."""

    name = "twin"

    def __init__(self, first: Executor, second: Executor) -> None:
        self.first, self.second = first, second
        self.manifest, self.num_blocks, self.detail = first.manifest, first.num_blocks, second.detail
        self.memory_bound_tokens = second.memory_bound_tokens
        self.steps: list[dict[str, Any]] = []
        self.drafts: list[float] = []
        """Largest difference of a draft logit, of each time that they were asked for."""

    @property
    def step_limits(self) -> tuple[int, int] | None:
        """The second's: it is the one that was compiled."""
        return self.second.step_limits

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        expected = self.first.execute(inputs)
        began = time.perf_counter()
        found = self.second.execute(inputs)
        seconds = time.perf_counter() - began
        self.steps.append(
            {
                "rows": int(inputs.kv_len.size),
                "tokens": int(inputs.input_ids.size),
                "copies": int(inputs.slot_copies.shape[0]),
                "shared": int((inputs.prefix_blocks > 0).sum()),
                "masked": bool(inputs.tree_mask.shape[1]),
                "milliseconds": round(1e3 * seconds, 3),
                "difference": float(np.abs(found - expected).max(initial=0.0)),
                "same_best": float((found.argmax(-1) == expected.argmax(-1)).mean()) if found.size else 1.0,
            }
        )
        return expected

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads."""
        self.first.load_draft_heads()
        self.second.load_draft_heads()

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        expected = self.first.draft_logits(wanted)
        self.drafts.append(float(np.abs(self.second.draft_logits(wanted) - expected).max(initial=0.0)))
        return expected

    def close(self) -> None:
        """Free both. Idempotent."""
        self.first.close()
        self.second.close()


def check(checkpoint: Path, options: tensorrt_engine.TensorRtOptions, folder: Path, max_tokens: int) -> dict[str, Any]:
    """Build both engines in `folder`, run the prompts, and return the report."""
    onnx_engine.build(checkpoint, folder / "cpu", block_size=options.block_size)
    began = time.perf_counter()
    tensorrt_engine.build(checkpoint, folder / "gpu", options)
    build_seconds = time.perf_counter() - began
    drafts = ("none", *(("medusa",) if Manifest.load(folder / "gpu").draft_heads else ()))
    twins = [_run(folder, DraftOptions(method, measured=False), max_tokens) for method in drafts]
    steps = [step for twin in twins for step in twin.steps]
    return {
        "detail": twins[0].detail,
        "build_seconds": round(build_seconds, 1),
        "steps": len(steps),
        "steps_with_copies": sum(step["copies"] > 0 for step in steps),
        "steps_with_shared_prefixes": sum(step["shared"] > 0 for step in steps),
        "steps_with_draft_trees": sum(step["masked"] for step in steps),
        "most_rows": max(step["rows"] for step in steps),
        "largest_difference": max(step["difference"] for step in steps),
        "largest_difference_of_drafts": max((value for twin in twins for value in twin.drafts), default=None),
        "same_best_token": round(float(np.mean([step["same_best"] for step in steps])), 4),
        "median_milliseconds": float(np.median([step["milliseconds"] for step in steps])),
        "worst_steps": sorted(steps, key=lambda step: -step["difference"])[:5],
    }


def _run(folder: Path, drafts: DraftOptions, max_tokens: int) -> TwinExecutor:
    """All prompts through both engines; what was seen is in the executor that comes back closed."""
    blocks = 64 * len(PROMPTS)
    first = load_executor(folder / "cpu", "onnx", num_blocks=blocks)
    try:
        twin = TwinExecutor(first, load_executor(folder / "gpu", "tensorrt", num_blocks=blocks))
    except BaseException:
        first.close()
        raise
    text = TextEngine(Engine(twin, SchedulerLimits(), draft=drafts), Tokenizer.load(folder / "cpu"))
    try:
        for prompt in PROMPTS:
            text.submit(text.encode(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0))
        while text.engine.step() is not None:
            pass
    finally:
        text.engine.close()
    return twin


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=tiny_checkpoint())
    parser.add_argument("--dtype", choices=tensorrt_engine.DTYPES, default="float16")
    parser.add_argument("--kv-binding", choices=KV_BINDINGS, default="in-place")
    parser.add_argument("--max-tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--tolerance", type=float, help="largest difference of a logit")
    parser.add_argument("-o", "--output", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)
    settings = tensorrt_engine.TensorRtOptions(
        dtype=options.dtype, kv_binding=options.kv_binding, max_rows=64, max_tokens=512
    )
    try:
        with tempfile.TemporaryDirectory(prefix="apar-check-") as folder:
            report = check(options.checkpoint, settings, Path(folder), options.max_tokens)
    except AparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tolerance = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    report["passed"] = max(report["largest_difference"], report["largest_difference_of_drafts"] or 0.0) <= tolerance
    text = json.dumps(report, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
