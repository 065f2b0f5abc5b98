"""Errors of single projections of a shape under each quantisation, on inputs that are made up.

Weights are normal numbers. Inputs are as language models have them in kind: their spectrum falls off as 1 / index,
channels differ in scale by a lognormal factor, and a few are thirty times larger than the rest. So figures compare
methods and group sizes at these sizes; they do not say what a real layer of a real model loses, and random weights
are the hardest case for any of them, having no structure of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from apar.export.gptq import gptq_rows, output_error
from apar.export.quantize import BITS, Float32Array, quantize_rows
from apar.runtime.bench.machine import describe_machine
from apar.runtime.bench.quality import Variant
from apar.runtime.bench.shapes import SHAPES, STANDARD_DEVIATION

ROWS = 256
"""Output channels that are computed: each is quantised by itself, so the error of more is the same."""
OUTLIERS, OUTLIER_SCALE = 6, 30.0
_RANK = 1024


def bench_layers(
    shape: str,
    chosen: Sequence[Variant],
    *,
    tokens: int = 8192,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Relative output error of a shape's projections, on the calibration inputs and on others of the same kind."""
    hidden, ffn, _, _, _ = SHAPES[shape]
    layers = []
    sizes = {"attention and gate_up": hidden, "down": ffn}
    done, total = 0, len(sizes) * len(chosen)
    for number, (name, columns) in enumerate(sizes.items()):
        rng = np.random.default_rng((seed, number))
        inputs = _inputs(rng, 2 * tokens, columns)
        seen, unseen = (part.T @ part / np.float32(tokens) for part in (inputs[:tokens], inputs[tokens:]))
        del inputs
        rows = rng.standard_normal((ROWS, columns), np.float32) * np.float32(STANDARD_DEVIATION)
        for variant in chosen:
            began = perf_counter()
            bits, size, zeros = BITS[variant.quantize], variant.group_size or columns, variant.zero_points
            if variant.method == "gptq":
                quantized = gptq_rows(rows, seen, bits, size, zeros)
            else:
                quantized = quantize_rows(rows, bits, size, zeros)
            values = quantized.values()
            layers.append(
                {
                    "projection": name,
                    "columns": columns,
                    "quantize": variant.quantize,
                    "method": variant.method,
                    "group_size": size,
                    "zero_points": zeros,
                    "bits": variant.bits,
                    "error_percent": 100 * output_error(rows, values, seen) ** 0.5,
                    "error_percent_other_tokens": 100 * output_error(rows, values, unseen) ** 0.5,
                    "seconds": perf_counter() - began,
                }
            )
            done += 1
            if progress:
                progress(done, total)
    return {
        "bench": "quality",
        "shape": shape,
        "rows": ROWS,
        "tokens": tokens,
        "seed": seed,
        "layers": layers,
        "machine": describe_machine(),
    }


def _inputs(rng: np.random.Generator, tokens: int, columns: int) -> Float32Array:
    rank = min(_RANK, columns)
    spectrum = (1 / np.sqrt(np.arange(1, rank + 1))).astype(np.float32)
    mix = rng.standard_normal((rank, columns), np.float32) * spectrum[:, None]
    scale = rng.lognormal(0, 0.7, columns).astype(np.float32)
    scale[rng.choice(columns, min(OUTLIERS, columns), replace=False)] *= np.float32(OUTLIER_SCALE)
    inputs = rng.standard_normal((tokens, rank), np.float32) @ mix
    inputs += np.float32(0.3) * rng.standard_normal((tokens, columns), np.float32)
    inputs *= scale
    return inputs
