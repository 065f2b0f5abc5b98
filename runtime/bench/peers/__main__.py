"""`python -m apar.runtime.bench.peers NAME`: the worker of one peer."""

from __future__ import annotations

import importlib
import sys

from apar.runtime.bench.peers.protocol import Peer, Task, serve


def _load(task: Task) -> Peer:
    module = importlib.import_module(f"apar.runtime.bench.peers.{sys.argv[1]}")
    peer: Peer = module.load(task)
    return peer


serve(_load)
