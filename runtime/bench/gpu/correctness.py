"""Every kernel and the whole executor against plain float32 computations."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apar.export.manifest import DecoderConfig, Manifest, TokenIds
from apar.plugins.gpu.dense import Matrix
from apar.runtime.bench.gpu import tiny
from apar.runtime.bench.gpu.cases import Case, Heads, Shape
from apar.runtime.bench.gpu.machine import Machine
from apar.runtime.bench.gpu.models import RandomWeights, plain_logits, prompt_step
from apar.runtime.bench.passing_executor import PassingExecutor
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.executor.cuda.executor import CudaExecutor
from apar.runtime.executor.model import Model
from apar.runtime.executor.torch_executor import TorchExecutor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, StepInputs

BOUNDS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 3e-2}
"""Largest error of attention, of its largest output."""
LOGIT_BOUND = 0.05
"""Relative error of the 7B shape's logits in bfloat16 (root mean square), over two layers."""

DECODE = Shape(3, 4, 192, 37)
SHAPES = {
    "decode, prefix pass": DECODE,
    "decode, one long row": Shape(1, 1, 0, 3000),
    "fork, two tokens": Shape(2, 3, 160, 5, tokens=2),
    "prefill": Shape(2, 1, 0, 0, tokens=150),
    "chunk behind a prefix": Shape(1, 2, 256, 19, tokens=70),
    "drafts": Shape(2, 2, 144, 9, tokens=40, drafts=True),
}
SMALL = {"decode": Shape(1, 2, 144, 3), "drafts": Shape(1, 1, 0, 20, tokens=5, drafts=True)}
MODELS = {
    "MHA 128": Heads(4, 4, 128, 16),
    "GQA 64": Heads(8, 2, 64, 16),
    "GQA 80": Heads(6, 2, 80, 32),
    "GQA 96": Heads(4, 1, 96, 8),
}


def kernels(machine: Machine, small: bool = False) -> dict[str, Any]:
    """Attention of every shape, head dimension and type; each run twice, which must agree to the last bit."""
    rows: list[dict[str, Any]] = []
    ok = True
    dtypes = machine.pick([torch.float16, torch.bfloat16, torch.float32], [torch.float32])
    shapes = SMALL if small or machine.dry else SHAPES
    models = {"MHA 64": Heads(2, 2, 64, 16)} if machine.dry else MODELS
    for model, heads in models.items():
        for name, shape in shapes.items():
            for dtype in dtypes if model == "GQA 64" else dtypes[:2]:
                case = Case(shape, heads, machine.device, dtype, seed=len(rows))
                planned = case.plan()
                made = case.operator.plan_on_device(case.sizes, case.step)
                items = slice(8, 8 + 8 * int(case.host_plan(True)[0]))
                same_plan = bool(torch.equal(made[:4], planned[:4]) and torch.equal(made[items], planned[items]))
                first = case.run(planned).clone()
                again = bool(torch.equal(first, case.run(planned)))
                expected = case.reference()
                error = float((first.float() - expected).abs().max() / expected.abs().max())
                good = error < BOUNDS[dtype] and again and same_plan
                ok &= good
                rows.append(
                    {
                        "model": model,
                        "shape": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "error": error,
                        "repeats": again,
                        "device plan": same_plan,
                        "ok": good,
                    }
                )
    return {"ok": ok, "rows": rows}


def matrices(machine: Machine) -> dict[str, Any]:
    """Products with 8-bit weights against those of the rounded weights, and what rounding itself costs."""
    rows, ok = [], True
    outputs, columns = machine.pick((4096, 4096), (40, 64))
    torch.manual_seed(0)
    weight = torch.randn(outputs, columns, device=machine.device)
    for form in ("int8", "fp8"):
        matrix = Matrix.of(weight, None, machine.dtype, form)
        rounded = matrix.values()
        for count in machine.pick((1, 8, 64, 300), (2,)):
            x = torch.randn(count, columns, device=machine.device).to(machine.dtype)
            expected = x.float() @ rounded.T
            error = float((matrix(x).float() - expected).norm() / expected.norm())
            against = float((matrix(x).float() - x.float() @ weight.T).norm() / (x.float() @ weight.T).norm())
            ok &= error < 1e-2
            rows.append({"weights": form, "rows": count, "error": error, "against 16 bits": against})
    return {"ok": ok, "rows": rows}


def tiny_model(machine: Machine) -> dict[str, Any]:
    """The shipped model, token for token: in float32 against the plain executor, in bfloat16 beside it; without and
    with drafts, which must change no token."""
    length = machine.pick(160, 2)
    limits = machine.pick(
        SchedulerLimits(max_rows=32, max_step_tokens=256), SchedulerLimits(max_rows=2, max_step_tokens=8)
    )
    model, prompts = tiny.tiny_model()
    prompts = machine.pick(prompts, [prompt[:6] for prompt in prompts[:1]])
    options: dict[str, Any] = {
        "device": str(machine.device),
        "num_blocks": 512,
        "max_rows": limits.max_rows,
        "max_step_tokens": limits.max_step_tokens,
    }
    expected = _generate(TorchExecutor(model, num_blocks=512), prompts, length, limits)
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "branches": sum(len(tree) for tree in expected),
        "tokens": sum(len(branch) for tree in expected for branch in tree),
    }
    for dtype, draft in (("float32", "none"), ("float32", "ngram"), *machine.pick((("bfloat16", "none"),), ())):
        trees = _generate(CudaExecutor(model, dtype=dtype, **options), prompts, length, limits, draft)
        name = dtype if draft == "none" else f"{dtype}_{draft}"
        found[f"{name}_equal"] = sum(a == b for a, b in zip(trees, expected, strict=True))
    exact = (found["float32_equal"], found["float32_ngram_equal"])
    good = exact == (len(prompts), len(prompts))
    if not machine.dry:
        # A pool in which answers preempt each other and come back from host memory.
        executor = CudaExecutor(model, dtype="float32", host_blocks=1024, **options | {"num_blocks": 64})
        swaps = CountedSwaps(executor)
        trees = _generate(swaps, prompts, length, limits)
        found["swapped_equal"] = sum(a == b for a, b in zip(trees, expected, strict=True))
        found["blocks_swapped_in"] = swaps.swapped_in
        good &= found["swapped_equal"] == len(prompts) and swaps.swapped_in > 0
    return {"ok": good, **found}


class CountedSwaps(PassingExecutor):
    """Counts the blocks that another executor swaps in; logits come to the host."""

    swapped_in = 0

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        self.swapped_in += len(inputs.swap_in)
        return super().execute(inputs)


def _generate(
    executor: Executor, prompts: list[list[int]], length: int, limits: SchedulerLimits, draft: str = "none"
) -> list[list[list[int]]]:
    """Tokens of every branch of every prompt, greedily, all prompts in one batch."""
    engine = Engine(executor, limits, draft=draft)
    requests = [
        engine.submit(str(i), prompt, SamplingParams(max_tokens=length, temperature=0.0))
        for i, prompt in enumerate(prompts)
    ]
    while engine.step() is not None:
        pass
    engine.cache.check()
    found = [[list(branch.tokens) for branch in request.branches] for request in requests]
    engine.close()
    return found


def seven_b(machine: Machine) -> dict[str, Any]:
    """Two layers of the 7B shape with random weights: prefill and one decoding step against plain float32."""
    hidden, ffn, heads = machine.pick((4096, 11008, 32), (128, 192, 2))
    decoder = DecoderConfig(
        vocab_size=machine.pick(32002, 300),
        hidden_size=hidden,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=ffn,
        rms_norm_eps=1e-6,
        max_context=2048,
        rope_inv_freq=tuple(float(10000.0 ** (-2 * i * heads / hidden)) for i in range(hidden // heads // 2)),
    )
    manifest = Manifest(decoder, TokenIds(fork=32000, child=32001, eos=(2,)), block_size=16)
    weights = RandomWeights(decoder, machine.device)
    rows, ok = [], True
    length = machine.pick(300, 9)
    ids = np.random.default_rng(0).integers(0, decoder.vocab_size, length).astype(np.int32)
    expected = plain_logits(decoder, weights, torch.from_numpy(ids).to(machine.device).long())
    for form in machine.pick(("16bit", "int8", "fp8"), ("16bit",)):
        executor = CudaExecutor(
            Model(manifest, weights),
            device=str(machine.device),
            dtype=str(machine.dtype).removeprefix("torch."),
            weights=form,
            num_blocks=64,
            max_rows=2,
            max_step_tokens=machine.pick(512, 16),
        )
        first = executor.execute(prompt_step(ids[:-1], 0, manifest.block_size))[0]
        second = executor.execute(prompt_step(ids, length - 1, manifest.block_size))[0]
        executor.close()
        for name, got, place in (("prefill", first, length - 2), ("decode", second, length - 1)):
            want = expected[place].cpu().numpy()
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            good = bool(np.isfinite(got).all()) and (form != "16bit" or error < LOGIT_BOUND)
            ok &= good
            rows.append({"weights": form, "step": name, "relative error of logits": error, "ok": good})
    return {"ok": ok, "rows": rows}


def sanitizer(machine: Machine, script: Path, seconds: float) -> dict[str, Any]:
    """The small kernel cases under compute-sanitizer's memcheck, where it is installed; `seconds` at most."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or machine.dry:
        return {"skipped": "compute-sanitizer is not installed" if tool is None else "a dry run"}
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        str(script),
        "--only",
        "small kernels",
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "report.json")
        try:
            done = subprocess.run(
                [*command, "-o", report], capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"compute-sanitizer was not done in {seconds:.0f} s"}
    return {"ok": done.returncode == 0, "exit": done.returncode, "summary": "\n".join(done.stdout.splitlines()[-6:])}
