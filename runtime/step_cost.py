"""How long a step will take, for those who decide what goes into it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from apar.runtime.step import StepInputs

Float64Array = npt.NDArray[np.float64]


class StepCost(ABC):
    """Predicts a step's duration from its tokens and from the K/V that it reads."""

    ready: bool = True
    """Whether predictions mean something yet."""

    @abstractmethod
    def seconds(self, tokens: npt.ArrayLike, kv: npt.ArrayLike) -> Float64Array:
        """Duration of steps that compute `tokens` tokens and read the K/V of `kv` tokens, elementwise."""

    def one(self, tokens: float, kv: float) -> float:
        """Duration of one step, as a plain number: what most decisions ask for."""
        return float(self.seconds(tokens, kv))

    def observe(self, tokens: int, kv: int, seconds: float) -> None:  # noqa: B027
        """Learn from a step that ran."""


class FittedStepCost(StepCost):
    """`seconds = base + a * tokens + b * kv`, fitted to the steps that ran.

    Least squares in which older steps fade: after `MEMORY` further steps one weighs a third. Nothing is predicted
    before `WARM` steps were seen. A step that took more than three times what was expected (a page fault, another
    process) counts as three times. Coefficients are never negative: where one would be, it is 0 and the others are
    fitted without it.
    """

    WARM = 16
    MEMORY = 500
    REFIT = 16
    """Steps between two solutions of the equations."""
    SCALE = np.array([1.0, 1e2, 1e4])
    """Of the unknowns, so that the equations are well conditioned."""

    def __init__(self) -> None:
        self.ready = False
        self.coefficients: Float64Array = np.zeros(3)
        """base, a, b."""
        self._products: Float64Array = np.zeros((3, 3))
        self._targets: Float64Array = np.zeros(3)
        self._seen = 0
        self._recent: list[tuple[float, float, float, float]] = []
        """Steps since the last solution: features and seconds."""
        self._expects: list[float] = [0.0, 0.0, 0.0]
        """`coefficients`, as plain numbers."""

    def seconds(self, tokens: npt.ArrayLike, kv: npt.ArrayLike) -> Float64Array:
        """See StepCost.seconds."""
        base, per_token, per_kv = self._expects
        predicted: Float64Array = base + per_token * np.asarray(tokens, float) + per_kv * np.asarray(kv, float)
        return predicted

    def one(self, tokens: float, kv: float) -> float:
        """See StepCost.one."""
        base, per_token, per_kv = self._expects
        return base + per_token * tokens + per_kv * kv

    def observe(self, tokens: int, kv: int, seconds: float) -> None:
        """See StepCost.observe."""
        if self.ready:
            seconds = min(seconds, 3.0 * self.one(tokens, kv))
        self._recent.append((1.0, tokens, kv, seconds))
        if len(self._recent) == self.REFIT:
            self._fold()
            self._seen += self.REFIT
            if self._seen >= self.WARM:
                self._fit()

    def _fold(self) -> None:
        """Let the steps since the last solution flow into the equations, the later the heavier."""
        recent = np.array(self._recent)
        self._recent.clear()
        features, seconds = recent[:, :3] / self.SCALE, recent[:, 3]
        fade = (1.0 - 1.0 / self.MEMORY) ** np.arange(self.REFIT, -1, -1)
        weighted = features.T * fade[1:]
        self._products = fade[0] * self._products + weighted @ features
        self._targets = fade[0] * self._targets + weighted @ seconds

    def _fit(self) -> None:
        free = [0, 1, 2]
        solution = np.zeros(3)
        while free:
            products = self._products[np.ix_(free, free)]
            # A little weight on zero where all steps seen were alike and do not tell the unknowns apart.
            ridge = 1e-6 * np.trace(products) / len(free) * np.eye(len(free))
            found = np.linalg.solve(products + ridge, self._targets[free])
            if (found >= 0).all():
                solution[free] = found
                break
            free = [index for index, value in zip(free, found.tolist(), strict=True) if value > 0]
        self.coefficients = solution / self.SCALE
        self._expects = self.coefficients.tolist()
        self.ready = bool(solution.any())


def kv_read(inputs: StepInputs, block_size: int) -> int:
    """Tokens whose K/V a step reads: every row its path, blocks that a group of siblings shares once."""
    bounds = inputs.prefix_rows
    again = bounds[1:] - bounds[:-1] - 1
    return int(np.add.reduce(inputs.kv_len)) - block_size * int(inputs.prefix_blocks.dot(again))
