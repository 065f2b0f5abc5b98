"""What the weight formats of the GPU executor cost in quality, measured without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from apar.plugins.gpu.dense import Matrix
from apar.runtime.bench.machine import describe_machine
from apar.runtime.bench.quality import Reference
from apar.runtime.executor.model import Model
from apar.runtime.executor.torch_executor import TorchExecutor
from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.text_engine import Prompt

FORMATS = ("bf16", "fp16", "int8", "fp8")
"""The first is what the others are held against."""
_MATRICES = (".qkv.weight", ".o.weight", ".gate_up.weight", ".down.weight")
_EXECUTOR = f"{__name__}:RoundedExecutor"


class RoundedExecutor(TorchExecutor):
    """The plain executor with weights rounded as the GPU stores them; arithmetic stays float32.

    Attributes:
        matrix_bytes: of the layers' matrices, as the GPU stores them.
    """

    def __init__(self, engine: Path | Model, *, weights: str = "bf16", num_blocks: int | None = None) -> None:
        """weights: one of FORMATS. Embedding, lm_head, norms and biases are 16-bit in all of them."""
        super().__init__(engine, num_blocks=num_blocks)
        dtype = torch.float16 if weights == "fp16" else torch.bfloat16
        form = weights if weights in ("int8", "fp8") else "16bit"
        self.matrix_bytes = 0
        for name, value in self._weights.items():
            if name.endswith(_MATRICES) and name.startswith("layers."):
                matrix = Matrix.of(value, None, dtype, form)
                self.matrix_bytes += matrix.bytes
                self._weights[name] = matrix.values()
            else:
                self._weights[name] = value.to(dtype).float()


def compare_formats(
    engine: Path, prompts: Sequence[Prompt], max_tokens: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Every format against bf16: KL divergence and perplexity over prompts and bf16's greedy answers, and how many
    trees of branches and answers come out the same. What `apar bench weights --json` prints."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    rows: list[dict[str, Any]] = []
    reference: Reference | None = None
    for done, form in enumerate(FORMATS):
        if progress:
            progress(done, len(FORMATS))
        llm = LLM(engine, executor=_EXECUTOR, weights=form)
        try:
            assert isinstance(llm.executor, RoundedExecutor)
            size = llm.executor.matrix_bytes
            if reference is None:
                reference = Reference(llm, prompts, params)
                row = dict(reference.row)
            else:
                row = reference.compare(llm, prompts, params)
        finally:
            llm.close()
        kept = ("prompts", "answers", "same_trees", "same_answers")
        rows.append({"weights": form, "matrix_bytes": size} | {name: row[name] for name in kept})
    assert reference is not None
    if progress:
        progress(len(FORMATS), len(FORMATS))
    return {
        "bench": "weights",
        "engine": engine.name,
        "prompts": len(prompts),
        "tokens": reference.tokens,
        "formats": rows,
        "machine": describe_machine(),
    }
