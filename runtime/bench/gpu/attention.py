"""Attention at the shapes of the targets: shared against unshared, and against what else is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from apar.runtime.bench.gpu.cases import Case, Heads, Shape
from apar.runtime.bench.gpu.machine import Machine

SHAPES = {
    "64 x 6, 500/200": Shape(64, 6, 496, 204),
    **{f"1 x {rows}, 500/200": Shape(1, rows, 496, 204) for rows in (1, 2, 4, 8, 16, 32)},
    **{f"1 x 1, {context}": Shape(1, 1, 0, context) for context in (2048, 8192, 32768)},
    **{f"8 x 4, {context}": Shape(8, 4, context - 208, 208) for context in (2048, 8192)},
}
DRY = {"2 x 2": Shape(2, 2, 144, 5)}
MODELS = {"MHA": Heads(32, 32, 128, 16), "GQA": Heads(32, 8, 128, 16)}
LAYERS = 8
"""Launches in one timed graph, over as many pools where they are small: the L2 cache must not serve them."""
L2_BYTES = 200 << 20


def attention(machine: Machine) -> dict[str, Any]:
    """Time of a layer's attention (RoPE, K/V write, attention, merge) with prefix passes and without.

    Percent of the copy bandwidth is of the bytes that have to be read: shared keys once.
    """
    rows: list[dict[str, Any]] = []
    gain = 0.0
    models = {"MHA": Heads(2, 2, 64, 16)} if machine.dry else MODELS
    for model, heads in models.items():
        for name, shape in (DRY if machine.dry else SHAPES).items():
            if model == "GQA" and shape.rows not in (1, 6):
                continue
            case = Case(shape, heads, machine.device, machine.dtype)
            must = shape.read_bytes_shared * case.key_bytes
            copies = machine.pick(max(1, min(LAYERS, L2_BYTES // must)), 1)
            cases = [case, *(Case(shape, heads, machine.device, machine.dtype, seed) for seed in range(1, copies))]
            row: dict[str, Any] = {"model": model, "shape": name}
            for label, share in (("shared", True), ("unshared", False)):
                plans = [each.plan(share) for each in cases]

                def work(plans: list[torch.Tensor] = plans, cases: list[Case] = cases) -> None:
                    for each, plan in zip(cases, plans, strict=True):
                        each.run(plan)

                row[f"{label} us"] = 1e6 * machine.seconds(work) / copies
            row["GB read"] = must / 1e9
            row["% of copy"] = machine.percent_of_copy(must, row["shared us"] * 1e-6)
            row["gain"] = row["unshared us"] / row["shared us"]
            row["SDPA us"] = _time(machine, _dense, case, graph=True)
            row["FlashInfer us"] = _time(machine, _flashinfer, case, graph=False)
            if name.startswith("64 x 6") and model == "MHA":
                gain = row["gain"]
            rows.append(row)
            del cases, case
    return {"rows": rows, "gain of sharing at 64 x 6": gain, "target": ">= 2"}


def flex_attention(machine: Machine) -> dict[str, Any]:
    """torch's FlexAttention, compiled, at one shape: dense keys of 8 x 6 branches of 700."""
    if machine.dry:
        return {"skipped": "a dry run"}
    from torch.nn.attention.flex_attention import flex_attention as flex

    case = Case(Shape(8, 6, 496, 204), MODELS["MHA"], machine.device, machine.dtype)
    q, k, v = _gathered(case)
    compiled = torch.compile(flex)
    ours = [machine.seconds(partial(case.run, case.plan(share))) for share in (True, False)]
    theirs = machine.seconds(lambda: compiled(q, k, v), graph=False)
    names = ("shared", "unshared", "FlexAttention")
    return {"rows": [{"8 x 6, 500/200": n, "us": 1e6 * s} for n, s in zip(names, (*ours, theirs), strict=True)]}


def _time(machine: Machine, other: Callable[[Case], Callable[[], object]], case: Case, *, graph: bool) -> float | str:
    """Microseconds of another implementation, or what kept it from running: it may not be installed."""
    try:
        return 1e6 * machine.seconds(other(case), graph=graph)
    except Exception as error:
        return type(error).__name__


def _gathered(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [R, H, 1, D] and dense keys and values [R, K, length, D]: every row's path copied out."""
    heads = case.heads
    length = int(case.arrays["kv_len"][0])
    q = torch.randn(case.arrays["kv_len"].size, heads.num_heads, case.shape.tokens, heads.head_dim)
    blocks = case.step.block_table.long()
    k, v = (part[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous() for part in case.pool)
    return q.to(k), k, v


def _dense(case: Case) -> Callable[[], object]:
    """torch's attention over dense copies of the paths: what unshared, unpaged attention costs."""
    if case.shape.read_bytes_alone * case.key_bytes > 24 << 30:
        raise MemoryError("too large for dense copies")
    q, k, v = _gathered(case)
    grouped = case.heads.num_heads != case.heads.num_kv_heads
    return lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def _flashinfer(case: Case) -> Callable[[], object]:
    """FlashInfer's paged decoding over the same blocks, unshared."""
    import flashinfer

    heads, size = case.heads, case.heads.block_size
    length = int(case.arrays["kv_len"][0])
    rows, device = case.arrays["kv_len"].size, case.pool.device
    width = -(-length // size)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), kv_layout="HND", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=device),
        case.step.block_table.flatten(),
        torch.full((rows,), (length - 1) % size + 1, dtype=torch.int32, device=device),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        size,
        q_data_type=case.pool.dtype,
        kv_data_type=case.pool.dtype,
    )
    pool = (case.pool[0], case.pool[1])
    q = case.workspace.q
    return lambda: wrapper.run(q, pool)
