"""Test doubles: the ONNX executor, which a test can hold before a step, make fail, crash or hang; or slow down."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from apar.export.errors import ExecutorError
from apar.runtime.executor.onnx import OnnxExecutor
from apar.runtime.step import Float32Array, StepInputs

NAME = "faulty_executor:FaultyExecutor"
SLOW = "faulty_executor:SlowExecutor"
SLOW_STEP_SECONDS = 0.02


class FaultyExecutor(OnnxExecutor):
    """Obeys the orders in `control`, a folder that it shares with the test."""

    def __init__(self, engine: Path, *, control: str, **options: Any) -> None:
        super().__init__(engine, **options)
        self._control = Path(control)
        self._steps = 0
        self._leaked: list[bytes] = []

    def execute(self, inputs: StepInputs) -> Float32Array:
        """Run the step, unless something else was ordered for it."""
        self._steps += 1
        (self._control / "steps").write_text(str(self._steps))
        order = self._order()
        if order.get("hold_at") and self._steps >= order["hold_at"]:
            (self._control / "holding").write_text(str(self._steps))
            while self._order().get("hold_at") == order["hold_at"]:
                time.sleep(0.002)
            (self._control / "holding").unlink()
            order = self._order()
        if order.get("pause"):
            time.sleep(order["pause"])
        if order.get("leak"):
            self._leaked.append(b"x" * int(order["leak"]))
        if order.get("fail_at") and order["fail_at"] <= self._steps < order["fail_at"] + order.get("times", 1):
            raise ExecutorError("the fault was ordered")
        if order.get("crash_at") == self._steps:
            os.abort()
        return super().execute(inputs)

    def _order(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self._control / "order").read_text()))
        return {}


class SlowExecutor(OnnxExecutor):
    """Takes its time, so that answers do not end while a test does something to the service."""

    def execute(self, inputs: StepInputs) -> Float32Array:
        """Run the step after a pause."""
        time.sleep(SLOW_STEP_SECONDS)
        return super().execute(inputs)


class Control:
    """The test's side of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> int:
        """Steps begun since the engine process started."""
        try:
            return int((self.folder / "steps").read_text() or 0)
        except (OSError, ValueError):
            return 0

    def order(self, **order: float) -> None:
        """Give an order: `hold_at`, `fail_at` (and `times`), `crash_at` a step; for each step `pause` (seconds) or
        `leak` (bytes)."""
        partial = self.folder / "order.partial"
        partial.write_text(json.dumps(order))
        partial.replace(self.folder / "order")

    def release(self) -> None:
        """Take every order back."""
        self.order()

    def await_hold(self) -> int:
        """Wait until a step is held; returns its number."""
        step = self.held_within(120.0)
        assert step is not None, "no step was held"
        return step

    def held_within(self, seconds: float) -> int | None:
        """The same, or None if none is held by then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                return int((self.folder / "holding").read_text())
            time.sleep(0.002)
        return None
