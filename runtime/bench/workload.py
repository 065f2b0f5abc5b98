"""What is replayed: recorded answers, in which order, and when each of them arrives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apar.export.errors import ExecutorError, RequestError
from apar.runtime.executor.recorded_trees import Tree, load_trees, text_tokens

WORKLOADS = Path(__file__).parent / "workloads"
"""Workloads that ship with the package: `NAME.trees.json`."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests: request i answers `trees[order[i]]`."""

    name: str
    trees: Sequence[Tree]
    order: Sequence[int]
    arrivals: Sequence[float] | None
    """Seconds of arrival, ascending from 0 on; None: a closed loop, where a request comes when another one ends."""
    concurrency: int = 1
    """Requests in flight in a closed loop."""
    rate: float | None = None
    """Mean arrivals a second, where there are `arrivals`."""
    seed: int = 0

    def __len__(self) -> int:
        return len(self.order)

    @property
    def longest_path(self) -> int:
        """Tokens of the longest path that any mixture of forks and inlined details can lead to, its end included."""
        return max(tree["prompt_tokens"] + text_tokens(tree) + forks(tree) + 4 for tree in self.trees)


def forks(tree: Tree) -> int:
    """Details of a recorded answer."""
    return sum(detail > 0 for _, detail in tree["segments"])


def plan_workload(
    source: str,
    *,
    requests: int | None = None,
    requests_per_second: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
) -> Workload:
    """Read trees and lay out requests over them.

    Args:
        source: a shipped workload's name or a JSON file (see `load_trees`).
        requests: how many; None: each tree once, but at least four times `concurrency`. The trees are gone through
            again and again, in a new order each time.
        requests_per_second: mean rate of Poisson arrivals.
        concurrency: requests in flight in a closed loop (default 1); not together with a rate.
        seed: of the order and of the arrivals; the same seed gives the same ones everywhere.

    Raises RequestError if an option is unusable, ExecutorError if the file is.
    """
    if requests_per_second is not None and concurrency is not None:
        raise RequestError("give requests_per_second or concurrency, not both")
    if requests_per_second is not None and not 0 < requests_per_second < float("inf"):
        raise RequestError(f"requests_per_second is {requests_per_second}, it must be a number above 0")
    in_flight = 1 if concurrency is None else concurrency
    trees = load_trees(_file(source))
    if not trees:
        raise ExecutorError(f"{source} holds no trees")
    _check(source, trees)
    count = max(len(trees), 4 * in_flight) if requests is None else requests
    if count < 1 or in_flight < 1:
        raise RequestError(f"requests and concurrency must be at least 1, not {count} and {in_flight}")
    chance = random.Random(seed)
    order: list[int] = []
    while len(order) < count:
        once = list(range(len(trees)))
        chance.shuffle(once)
        order += once
    arrivals = None if requests_per_second is None else poisson(count, requests_per_second, seed)
    name = Path(source).name.removesuffix(".json").removesuffix(".trees")
    return Workload(name, trees, order[:count], arrivals, in_flight, requests_per_second, seed)


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """`count` arrival times in seconds with exponential gaps of mean 1 / `rate`; the first is at 0."""
    chance = random.Random(f"arrivals {seed}")
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + chance.expovariate(rate))
    return times


def _file(source: str) -> Path:
    shipped = WORKLOADS / f"{source}.trees.json"
    return shipped if shipped.is_file() and not Path(source).exists() else Path(source)


def _check(source: str, trees: Sequence[Tree]) -> None:
    for index, tree in enumerate(trees):
        try:
            whole = [tree["prompt_tokens"], *(n for main, detail in tree["segments"] for n in (main, detail))]
        except (KeyError, TypeError, ValueError):
            whole = [None]
        if not all(type(n) is int for n in whole):
            raise ExecutorError(
                f'{source}: tree {index} is not of the form {{"prompt_tokens": N, "segments": [[main, detail], ...]}} '
                "with whole numbers"
            )
