"""How long a step with drafts takes by its tokens, so that a draft is as large as pays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

WARM = 24
"""Steps until predictions are used."""
_REFIT = 16
_FADE = 1 - 1 / 300


class DraftCost:
    """`seconds = base + a * tokens + b * drafted`: least squares over the steps that ran, older ones fading."""

    def __init__(self) -> None:
        self.ready = False
        self.base = 0.0
        """Seconds of a step with drafts, whatever its tokens."""
        self.per_token = 0.0
        self._seen = 0
        self._products: Float64Array = np.zeros((3, 3))
        self._targets: Float64Array = np.zeros(3)
        self._mean = 0.0

    def observe(self, tokens: int, seconds: float, drafted: bool) -> None:
        """A step ran that computed so many tokens."""
        if self._seen >= _REFIT:
            seconds = min(seconds, 3 * self._mean)
        self._mean += max(1 / 32, 1 / (self._seen + 1)) * (seconds - self._mean)
        features = np.array((1.0, 0.1 * tokens, 1.0 if drafted else 0.0))
        self._products *= _FADE
        self._products += features[:, None] * features
        self._targets *= _FADE
        self._targets += seconds * features
        self._seen += 1
        if self._seen >= WARM and self._seen % _REFIT == 0:
            self._fit()

    def _fit(self) -> None:
        # A little weight on zero where all steps were alike and do not tell the unknowns apart.
        ridge = 1e-4 * np.trace(self._products) / 3 * np.eye(3)
        base, slope, extra = np.linalg.solve(self._products + ridge, self._targets).tolist()
        self.per_token = max(0.1 * slope, 0.0)
        self.base = base + extra
        self.ready = self.base > 0
