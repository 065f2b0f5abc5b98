"""Ctrl-C between two steps: the first press asks, the second one forces. So do a kill and a terminal that is closed."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """While the block runs, the first signal only sets `pressed`, so that what was said so far can be kept.

    SIGTERM and SIGHUP end the process at the end of the block, with the terminal in order.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._ending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup asks for that
                    self._before[number] = signal.signal(number, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ending is not None:
            signal.raise_signal(self._ending)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._ending = number
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
