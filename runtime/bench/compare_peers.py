"""The same shape and bits on other engines: milliseconds a step at several numbers of rows, all in one run.

Every peer is loaded once, in a process of its own, and peers take turns: for each round and number of rows, each
peer measures a few steps, in an order that turns round. Rows are separate sequences with `context` tokens behind
them, so nothing is shared. Medians over all steps of all rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from apar.runtime.bench.machine import describe_machine
from apar.runtime.bench.peer_process import PeerProcess, PeerUnavailable
from apar.runtime.bench.peers import MODULES
from apar.runtime.bench.peers.protocol import Task
from apar.runtime.bench.shapes import shape_config, shape_engine
from apar.runtime.bench.stock_engine import stock_engine
from apar.runtime.engine_source import cache_directory
from apar.runtime.executor.threads import default_threads

PAUSE_SECONDS = 0.05
"""Before each measurement: threads of the one before stop to spin."""


def compare_peers(
    shape: str,
    weights: str,
    *,
    names: Sequence[str] = tuple(MODULES),
    rows: Sequence[int] = (1, 2, 4, 8),
    context: int = 128,
    steps: int = 8,
    rounds: int = 5,
    layers: int | None = None,
    threads: int | None = None,
    python: str = sys.executable,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure `names` on a shape; peers that cannot run are named with the reason. What `--json` prints.

    Raises EngineError where there is no such shape or format, PeerUnavailable where not a single peer can run.
    """
    threads = threads or default_threads()
    engine = shape_engine(shape, weights, layers=layers, seed=seed)
    folder = cache_directory() / "peers" / f"{shape}-{layers or 'all'}-layers"
    config = shape_config(shape, layers)
    loaded: list[PeerProcess] = []
    missing: dict[str, str] = {}
    try:
        for name in names:
            own = stock_engine(engine) if name == "onnxruntime" else engine
            task = Task(config, weights, threads, context, max(rows), steps + 1, str(folder), seed, str(own))
            try:
                loaded.append(PeerProcess(name, task, python))
            except PeerUnavailable as error:
                missing[name] = str(error)
        if not loaded:
            raise PeerUnavailable("; ".join(missing.values()))
        found = _take_turns(loaded, rows, steps, rounds, missing, progress)
        details = {peer.name: peer.detail for peer in loaded}
    finally:
        for peer in loaded:
            peer.close()
    return {
        "bench": "peers",
        "settings": {
            "shape": shape,
            "layers": layers,
            "format": weights,
            "context": context,
            "steps": steps,
            "rounds": rounds,
            "threads": threads,
            "seed": seed,
        },
        "peers": [_figures(name, details[name], found[name]) for name in found],
        "against_apar": _against(found),
        "missing": missing,
        "machine": describe_machine(),
    }


def _take_turns(
    loaded: list[PeerProcess],
    rows: Sequence[int],
    steps: int,
    rounds: int,
    missing: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[int, list[float]]]:
    """Seconds of every step by peer and number of rows. A peer that fails is left out, and its reason kept."""
    found: dict[str, dict[int, list[float]]] = {peer.name: {count: [] for count in rows} for peer in loaded}
    done, total = 0, rounds * len(rows)
    for turn in range(rounds):
        for count in rows:
            start = done % len(loaded)
            for peer in loaded[start:] + loaded[:start]:
                if peer.name not in found:
                    continue
                time.sleep(PAUSE_SECONDS)
                try:
                    found[peer.name][count] += peer.measure(count, steps)
                except PeerUnavailable as error:
                    missing[peer.name] = str(error)
                    del found[peer.name]
            done = turn * len(rows) + list(rows).index(count) + 1
            if progress:
                progress(done, total)
    return found


def _figures(name: str, detail: str, seconds: dict[int, list[float]]) -> dict[str, Any]:
    median = {count: statistics.median(values) for count, values in seconds.items()}
    least = min(median)
    return {
        "peer": name,
        "detail": detail,
        "rows": [
            {
                "rows": count,
                "ms_per_step": 1e3 * median[count],
                "fastest_ms": 1e3 * min(seconds[count]),
                "ratio_to_fewest_rows": median[count] / median[least],
                "tokens_per_second": count / median[count],
            }
            for count in median
        ],
    }


def _against(found: dict[str, dict[int, list[float]]]) -> dict[str, dict[str, float]]:
    """How many times as long each peer's steps take as apar's, by number of rows."""
    if "apar" not in found:
        return {}
    return {
        name: {
            str(count): statistics.median(values) / statistics.median(found["apar"][count])
            for count, values in seconds.items()
        }
        for name, seconds in found.items()
        if name != "apar"
    }
