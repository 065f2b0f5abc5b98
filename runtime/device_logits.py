"""Logits that stay where they were computed; the sampler asks for what it needs of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apar.runtime.step import Float32Array, Int32Array, IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Drawn:
    """What one call of `DeviceLogits.draw` gives."""

    tokens: Int32Array
    """[L] a token for each row."""
    good: BoolArray
    """[L] whether the row's logits could be sampled from."""
    denied: BoolArray
    """[L] rows in which the watched token was banned and would have been the likeliest; also true in rows that are
    not good."""


class DeviceLogits(ABC):
    """Logits float32 [L, vocab] in a device's memory, valid until the executor's next step."""

    shape: tuple[int, int]

    @abstractmethod
    def host(self, rows: IntArray | None = None) -> Float32Array:
        """Copy all rows, or some, to the host."""

    @abstractmethod
    def take(self, rows: IntArray) -> DeviceLogits:
        """A copy of some rows."""

    @abstractmethod
    def draw(
        self,
        vocab_size: int,
        bans: list[tuple[int, BoolArray]],
        drawn: BoolArray,
        numbers: npt.NDArray[np.float64],
        uniforms: npt.NDArray[np.float64],
        watched: int | None = None,
    ) -> Drawn:
        """Draw a token for each row.

        vocab_size: tokens that may come out. bans: tokens and the rows [L] they are banned in. drawn: [L] rows that
        draw; the others take the largest logit. numbers: float64 [L, 4] inverse temperature, top-k (0: off), top-p,
        min-p. uniforms: [L] the rows' random numbers. watched: token of `Drawn.denied`; None: nobody asks.
        """
