"""Whole steps of the 7B shape with random weights: decoding and forks, beside the card's limits."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import numpy as np
import torch

from apar.export.manifest import DecoderConfig, Manifest, TokenIds
from apar.plugins.gpu.dense import Matrix
from apar.plugins.gpu.plan import make_plan
from apar.plugins.gpu.sizes import StepSizes
from apar.runtime.bench.gpu.machine import Machine
from apar.runtime.bench.gpu.models import RandomWeights, decode_step
from apar.runtime.executor.check import check_step
from apar.runtime.executor.cuda.buckets import Bucket
from apar.runtime.executor.cuda.executor import CudaExecutor
from apar.runtime.executor.cuda.step_buffers import Layout, StepBuffers
from apar.runtime.executor.model import Model
from apar.runtime.step import StepInputs

CONTEXT = 512
"""Keys before the token of a timed decoding step."""


def model_7b(machine: Machine) -> Model:
    """Vicuna-7B's shape; in a dry run two tiny layers."""
    hidden, ffn, heads, layers = machine.pick((4096, 11008, 32, 32), (128, 128, 2, 1))
    dim = hidden // heads
    decoder = DecoderConfig(
        vocab_size=machine.pick(32002, 2002),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        intermediate_size=ffn,
        rms_norm_eps=1e-6,
        max_context=2048,
        rope_inv_freq=tuple(float(10000.0 ** (-2 * i / dim)) for i in range(dim // 2)),
    )
    manifest = Manifest(decoder, TokenIds(fork=decoder.vocab_size - 2, child=decoder.vocab_size - 1, eos=(2,)), 16)
    return Model(manifest, RandomWeights(decoder, machine.device))


def load(machine: Machine, model: Model, weights: str = "16bit") -> CudaExecutor:
    """The executor with its graphs and random keys and values; in a dry run on the CPU, without graphs."""
    executor = CudaExecutor(
        model,
        device=str(machine.device),
        dtype=str(machine.dtype).removeprefix("torch."),
        weights=weights,
        num_blocks=machine.pick(None, 512),
        max_rows=machine.pick(256, 4),
        max_step_tokens=machine.pick(1024, 16),
    )
    executor.fill_pools()
    return executor


def decode_steps(machine: Machine, executor: CudaExecutor) -> dict[str, Any]:
    """Steps of one token a row, all rows with paths of their own, sampled greedily on the device, as a server does.

    The roofline: the weights once and every row's keys once, at the copy bandwidth measured before.
    """
    decoder, size = executor.manifest.decoder, executor.manifest.block_size
    context = machine.pick(CONTEXT, 20)
    weight_bytes = executor.weight_bytes
    element = machine.pick("float16", "float32")
    rows: list[dict[str, Any]] = []
    first = 0.0
    for count in machine.pick((1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2)):
        if count * (context // size + 1) > executor.num_blocks:
            continue
        step = decode_step(count, context, size, decoder.vocab_size)
        seconds = _step_seconds(machine, executor, step)
        must = weight_bytes + count * context * decoder.kv_bytes_per_token(element)
        first = first or seconds
        rows.append(
            {
                "rows": count,
                "ms": 1e3 * seconds,
                "tokens/s": count / seconds,
                "% of roofline": machine.percent_of_copy(must, seconds),
                "x one branch": count * first / seconds,
            }
        )
    by_rows = {row["rows"]: row for row in rows}
    return {
        "rows": rows,
        "weight_bytes": weight_bytes,
        "one branch, % of copy (target 85)": by_rows[1]["% of roofline"],
        "8 branches, share of 8 x one (target 0.95)": by_rows[8]["x one branch"] / 8 if 8 in by_rows else None,
    }


def fork_cost(machine: Machine, executor: CudaExecutor) -> dict[str, Any]:
    """A step of 8 rows in which one forks, its partial block copied, against the step of 9 rows that it becomes."""
    size, vocab = executor.manifest.block_size, executor.manifest.decoder.vocab_size
    count = machine.pick(8, 2)
    plain = decode_step(count + 1, machine.pick(CONTEXT, 20), size, vocab)
    forked = decode_step(count + 1, machine.pick(CONTEXT, 20), size, vocab)
    # The last row's block is filled from the first one's, but for the slot that this step writes.
    source, target = (int(forked.block_table[row, -1]) * size for row in (0, count))
    slots = np.arange(size, dtype=np.int32)
    slots = slots[target + slots != forked.slot_mapping[count]]
    forked.slot_copies = np.stack((source + slots, target + slots), 1).astype(np.int32)
    before, after = (_step_seconds(machine, executor, step) for step in (plain, forked))
    return {"step_ms": 1e3 * before, "fork_step_ms": 1e3 * after, "percent (target 1)": 100 * (after / before - 1)}


def _step_seconds(machine: Machine, executor: CudaExecutor, step: StepInputs) -> float:
    """Median of whole steps: the host's checks, the plan, the copy, the graph, the tokens' way back."""
    count = step.logits_rows.size
    nobody, numbers = np.zeros(count, np.bool_), np.zeros((count, 4))
    times = []
    for _ in range(machine.pick(30, 1)):
        began = time.perf_counter()
        logits = executor.logits(step)
        logits.draw(executor.manifest.decoder.vocab_size, [], nobody, numbers, numbers[:, 0])
        times.append(time.perf_counter() - began)
    return statistics.median(times[machine.pick(5, 0) :])


def weight_formats(machine: Machine, model: Model) -> dict[str, Any]:
    """One and eight rows with 8-bit weights."""
    rows = []
    for form in ("int8", "fp8"):
        executor = load_small(machine, model, form)
        for count in machine.pick((1, 8, 64), (1,)):
            step = decode_step(count, machine.pick(CONTEXT, 20), 16, executor.manifest.decoder.vocab_size)
            seconds = _step_seconds(machine, executor, step)
            rows.append(
                {
                    "weights": form,
                    "rows": count,
                    "ms": 1e3 * seconds,
                    "% of copy, weights alone": machine.percent_of_copy(executor.weight_bytes, seconds),
                }
            )
        executor.close()
    return {"rows": rows}


def load_small(machine: Machine, model: Model, weights: str) -> CudaExecutor:
    """An executor with few buckets and a small pool."""
    return CudaExecutor(
        model,
        device=str(machine.device),
        dtype=str(machine.dtype).removeprefix("torch."),
        weights=weights,
        num_blocks=machine.pick(4096, 64),
        max_rows=machine.pick(64, 1),
        max_step_tokens=machine.pick(128, 2),
    )


def matrices(machine: Machine) -> dict[str, Any]:
    """One matrix of the 7B shape, [22016, 4096], by rows and format: percent of the bandwidth, or of the GEMM rate."""
    outputs, columns = machine.pick((22016, 4096), (64, 64))
    rows = []
    for form in ("16bit", "int8", "fp8"):
        copies = [
            Matrix.of(torch.randn(outputs, columns, device=machine.device), None, machine.dtype, form)
            for _ in range(machine.pick(4, 1))
        ]
        for count in machine.pick((1, 4, 16, 64, 256, 1024), (2,)):
            x = torch.randn(count, columns, device=machine.device).to(machine.dtype)

            def work(x: torch.Tensor = x, copies: list[Matrix] = copies) -> None:
                for matrix in copies:
                    matrix(x)

            seconds = machine.seconds(work) / len(copies)
            rows.append(
                {
                    "weights": form,
                    "rows": count,
                    "us": 1e6 * seconds,
                    "% of copy": machine.percent_of_copy(copies[0].bytes, seconds),
                    "% of GEMM": machine.percent_of_gemm(2.0 * count * outputs * columns, seconds),
                }
            )
    return {"rows": rows}


def host_costs(machine: Machine) -> dict[str, Any]:
    """Microseconds of the host's part of a decoding step: checks, the plan, and writing it all to pinned memory with a
    plan that was foreseen. Four rows a group where there are several."""
    heads, size = 32, 16
    rows_of: list[dict[str, Any]] = []
    for rows in machine.pick((1, 8, 64, 256), (1, 8)):
        step = decode_step(rows, 700, size, 32000, requests=max(1, rows // 4))
        step.prefix_blocks[:] = 31 if rows > 1 else 0
        bucket = Bucket(rows, rows, rows)
        sizes = StepSizes(rows, rows, bucket.groups, heads, heads)
        layout = Layout(bucket, sizes, 128)
        buffers = StepBuffers(layout.size, size, machine.device)
        named = {name: getattr(step, name) for name in ("query_start", "kv_len", "slot_mapping")}
        shared = {name: getattr(step, name) for name in ("prefix_rows", "prefix_blocks")}
        before = dataclasses.replace(step, kv_len=step.kv_len - 1)
        blocks = step.block_table.size
        repeats = machine.pick(200, 3)
        times: dict[str, list[float]] = {"check us": [], "plan us": [], "send us": []}
        for _ in range(repeats):
            began = time.perf_counter()
            check_step(step, num_blocks=blocks, block_size=size, vocab_size=32000)
            checked = time.perf_counter()
            make_plan(sizes, **named, **shared, block_size=size, masked=False)
            planned = time.perf_counter()
            buffers.foresee(layout, before)
            machine.synchronize()
            foreseen = time.perf_counter()
            buffers.send(layout, step)
            times["send us"].append(time.perf_counter() - foreseen)
            times["check us"].append(checked - began)
            times["plan us"].append(planned - checked)
        assert buffers.foreseen_plans == repeats
        rows_of.append({"rows": rows} | {name: 1e6 * statistics.median(values) for name, values in times.items()})
    return {"rows": rows_of, "plan us": "is hidden behind the device's work where the step was foreseen"}
