"""Sampling parameters as inputs of the models of the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from apar.runtime.sampling_params import SamplingParams

_NAMES = {"stop": "stop_words"}
"""Parameter -> input, where they differ."""


def model_inputs(params: SamplingParams, names: Iterable[str]) -> dict[str, Any]:
    """Inputs for the parameters that are named; empty lists, which mean nothing, are left out."""
    inputs: dict[str, Any] = {}
    for name in names:
        value = getattr(params, name)
        if name == "logit_bias":
            value = json.dumps({str(token): bias for token, bias in value.items()})
        elif isinstance(value, tuple):
            value = list(value)
        if value != []:
            inputs[_NAMES.get(name, name)] = value
    return inputs
