"""Every branch of every answer is what transformers decodes greedily from its path, with the bans applied.

One forward pass over a branch's whole path gives the logits of an ordinary causal decode at every position;
by induction over positions, the branch equals plain greedy decoding if each of its tokens is the largest
allowed one. The two libraries round differently, so a token within `TIE` of the largest counts as equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from apar.runtime.limits import SchedulerLimits
from apar.runtime.llm import LLM
from apar.runtime.outputs import BranchOutput, RequestOutput
from apar.runtime.sampling_params import SamplingParams

TIE = 1e-3
PARAMS = SamplingParams(max_tokens=600)


@pytest.fixture(scope="module")
def reference(tiny_directory: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32).eval()


def path_of(output: RequestOutput, branch: BranchOutput, fork: int, child: int) -> list[int]:
    """The branch's path before its own tokens: prompt, ancestors up to their forks, its [Child]."""
    if branch.parent_id is None:
        return list(output.prompt_token_ids)
    parent = output.branches[branch.parent_id]
    ordinal = parent.children.index(branch.branch_id)
    position = [i for i, token in enumerate(parent.token_ids) if token == fork][ordinal]
    return [*path_of(output, parent, fork, child), *parent.token_ids[: position + 1], child]


def check(output: RequestOutput, reference: LlamaForCausalLM, tokens: Any, params: SamplingParams) -> int:
    """Assert that all branches equal plain decoding; returns how many tokens were compared."""
    compared = 0
    for branch in output.branches:
        head = path_of(output, branch, tokens.fork, tokens.child)
        own = [*branch.token_ids, *([tokens.eos[0]] if branch.finish_reason == "stop" else [])]
        path = [*head, *own]
        with torch.no_grad():
            logits = reference(torch.tensor([path])).logits[0].numpy()
        for i, token in enumerate(own):
            row = logits[len(head) + i - 1].copy()
            row[tokens.child] = -np.inf
            if path[len(head) + i - 1] in (tokens.fork, tokens.child) or branch.depth >= params.max_depth:
                row[tokens.fork] = -np.inf
            assert row[token] >= row.max() - TIE, (
                f"branch {branch.branch_id} has {token} at {i}, plain decoding {int(row.argmax())}"
            )
            compared += 1
    return compared


def trees(outputs: list[RequestOutput]) -> list[list[tuple[int | None, list[int]]]]:
    return [[(b.parent_id, b.token_ids) for b in o.branches] for o in outputs]


@pytest.fixture(scope="module")
def plain(tiny_engine: Path, heldout: list[dict[str, Any]]) -> list[RequestOutput]:
    """Every held-out prompt, answered alone."""
    with LLM(tiny_engine, num_blocks=256, threads=1) as llm:
        return [llm.generate([entry["messages"]], PARAMS)[0] for entry in heldout]


def test_every_branch_equals_plain_decoding(
    plain: list[RequestOutput], reference: LlamaForCausalLM, tiny_engine: Path
) -> None:
    with LLM(tiny_engine, num_blocks=64, threads=1) as llm:
        tokens = llm.manifest.tokens
    compared = sum(check(output, reference, tokens, PARAMS) for output in plain)
    assert compared > 5000
    assert sum(len(output.branches) > 1 for output in plain) > len(plain) // 3
    assert all(output.finish_reason == "stop" for output in plain)


@pytest.mark.parametrize(
    ("block_size", "chunk", "num_blocks", "graph"),
    [
        (16, 64, 4096, "native"),
        (8, 1024, 4096, "native"),
        (32, 40, 512, "native"),
        (16, 256, 100, "native"),
        (16, 64, 4096, "portable"),
    ],
)
def test_batch_order_chunks_and_block_size_change_nothing(
    plain: list[RequestOutput],
    heldout: list[dict[str, Any]],
    build_tiny: Callable[..., Path],
    block_size: int,
    chunk: int,
    num_blocks: int,
    graph: str,
) -> None:
    """The same tokens whatever runs beside, in whatever order, chunks and blocks; 100 blocks force preemption."""
    limits = SchedulerLimits(max_rows=min(chunk // 2, 128), max_step_tokens=chunk, max_live_branches=1024)
    engine = build_tiny(block_size=block_size)
    order = np.random.default_rng(block_size + chunk).permutation(len(heldout))
    with LLM(engine, num_blocks=num_blocks, graph=graph, limits=limits, threads=1 + (block_size == 32)) as llm:
        outputs = llm.generate([heldout[i]["messages"] for i in order], PARAMS)
        stats = llm.stats()
    assert trees(outputs) == trees([plain[i] for i in order])
    assert stats["kv_blocks_used"] == 0
    if num_blocks == 100:
        assert stats["preemptions"] > 0


def test_torch_executor_decodes_the_same(
    plain: list[RequestOutput], heldout: list[dict[str, Any]], tiny_engine: Path
) -> None:
    some = range(0, len(heldout), 6)
    with LLM(tiny_engine, executor="torch", num_blocks=512) as llm:
        outputs = llm.generate([heldout[i]["messages"] for i in some], PARAMS)
    assert trees(outputs) == trees([plain[i] for i in some])


def test_without_forks_each_answer_is_one_branch(
    heldout: list[dict[str, Any]], tiny_engine: Path, reference: LlamaForCausalLM
) -> None:
    params = SamplingParams(max_tokens=120, fork=False)
    with LLM(tiny_engine, num_blocks=512, threads=1) as llm:
        outputs = llm.generate([entry["messages"] for entry in heldout[:12]], params)
        assert all(len(output.branches) == 1 for output in outputs)
        assert all(output.timing.steps == output.usage.completion_tokens for output in outputs)


def test_a_fork_costs_no_step(plain: list[RequestOutput]) -> None:
    """Steps of an answer equal the longest chain through its tree, with no step for the birth of a child."""
    for output in plain:
        ends: dict[int, int] = {}
        starts = {0: 0}
        for branch in output.branches:
            own = len(branch.token_ids) + (branch.finish_reason == "stop")
            ends[branch.branch_id] = starts[branch.branch_id] + own
            forks = [i for i, token in enumerate(branch.token_ids) if branch.children and token == fork_id(output)]
            for child, position in zip(branch.children, forks, strict=True):
                starts[child] = starts[branch.branch_id] + position + 1
        assert output.timing.steps == max(ends.values())


def fork_id(output: RequestOutput) -> int:
    root = output.branches[0]
    return max(root.token_ids) if root.children else -1
