"""One answer of an engine, step by step: who wrote what when, and the KV books with forks and without.

The engine answers a question. Then the shape of that answer is decoded again both ways with forced tokens, since the
same text without forks is what the KV pool is to be compared on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.bench.trees import TreesBench
from apar.runtime.bench.workload import Workload
from apar.runtime.executor import load_executor
from apar.runtime.llm import LLM
from apar.runtime.outputs import BranchOutput, RequestOutput
from apar.runtime.sampling_params import SamplingParams

QUESTION = "Give me five facts about owls."


def live_example(engine: Path, question: str = QUESTION, **options: Any) -> dict[str, Any]:
    """Ask `engine`; the result is the section `live` of a report. Raises RequestError where it says nothing."""
    with LLM(engine, executor="onnx", **options) as llm:
        answer = llm.generate(question, SamplingParams(max_tokens=400))[0]
    if not answer.usage.completion_tokens:
        raise RequestError(f"the engine has no answer to {question!r}; give another --question")
    tree = recorded_tree(answer)
    bench = TreesBench(load_executor(engine, "onnx", **options), Workload("live", [tree], [0], None), 1)
    try:
        result = bench.run()
    finally:
        bench.close()
    return {
        "bench": "live",
        "question": question,
        "text": answer.text,
        "tokens": answer.usage.completion_tokens,
        "steps": answer.timing.steps,
        "branches": [
            {
                "branch": branch.branch_id,
                "parent": branch.parent_id,
                "depth": branch.depth,
                "tokens": len(branch.token_ids),
                "first_step": branch.first_step,
                "last_step": branch.last_step,
                "label": "".join(branch.segments).strip(),
            }
            for branch in answer.branches
            if branch.last_step >= 0
        ],
        "books": result["example"],
        "gain": result["all"],
        "engine": result["engine"],
        "machine": result["machine"],
    }


def recorded_tree(answer: RequestOutput) -> dict[str, Any]:
    """An answer in the form of recorded ones: [main tokens, detail tokens] in order; a fork's fork is in its detail."""
    root, by_id = answer.branches[0], {branch.branch_id: branch for branch in answer.branches}
    lengths = _segment_lengths(root)
    segments = []
    for length, child in zip(lengths, [*root.children, None], strict=True):
        detail = 0 if child is None else _size(by_id[child], by_id)
        segments.append([max(length, 1), detail])
    if len(segments) > 1 and not lengths[-1]:
        segments.pop()  # the answer ended on a fork
    return {"prompt_tokens": max(len(answer.prompt_token_ids), 2), "segments": segments}


def _segment_lengths(branch: BranchOutput) -> list[int]:
    """Text tokens before each fork and after the last; forks share out what the branch wrote by its text's lengths."""
    own = len(branch.token_ids) - len(branch.children)
    sizes = [len(segment) for segment in branch.segments]
    total, seen = max(sum(sizes), 1), 0
    lengths: list[int] = []
    for size in sizes[:-1]:
        seen += size
        lengths.append(max(own * seen // total - sum(lengths), 0))
    return [*lengths, max(own - sum(lengths), 0)]


def _size(branch: BranchOutput, by_id: dict[int, BranchOutput]) -> int:
    own = len(branch.token_ids) - len(branch.children)
    return max(own + sum(_size(by_id[child], by_id) for child in branch.children), 1)
