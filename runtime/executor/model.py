"""A model in memory: what the torch executors run, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apar.export.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Model:
    """A manifest and float32 weights by the names of `read_weights`, on the host or on a device already."""

    manifest: Manifest
    weights: Mapping[str, npt.NDArray[np.float32] | Tensor]

    @classmethod
    def of(cls, engine: Path | Model) -> Model:
        """The model of an engine directory; a model is given back as it is. Raises EngineError for a damaged engine."""
        if isinstance(engine, Model):
            return engine
        # Needs packages that a GPU box may not have, and models in memory do not need.
        from apar.export.engine_weights import read_weights

        return cls(Manifest.load(engine), read_weights(engine))
