"""Inverse frequencies of rotary position embedding, with the scaling types of Llama checkpoints.

Formulas: RoFormer (arXiv 2104.09864), position interpolation (arXiv 2306.15595), Llama 3.1's wavelength
bands, YaRN (arXiv 2309.00071). All of them leave one fixed vector of frequencies. "dynamic" changes them once a
sequence is longer than `max_position_embeddings`, and cached keys would have to be turned again: it is built for
contexts up to that length, where it is no scaling at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apar.export.errors import CheckpointError

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn")
_DEFAULT_THETA = 10000.0
_LARGEST = 1e12


@dataclass(frozen=True, slots=True)
class Rope:
    """What the decoder needs of RoPE: angle = position * inv_freq, cos and sin times `scale`."""

    inv_freq: tuple[float, ...]
    scale: float
    context_limit: int
    """Longest context that the scaling was made for, in tokens."""


def rope_from_config(config: Mapping[str, Any], head_dim: int, max_position: int) -> Rope:
    """Read RoPE from a `config.json`: `rope_theta` and `rope_scaling`, or the newer `rope_parameters`.

    Raises CheckpointError for a scaling type that has no fixed frequencies, or lacks a parameter.
    """
    parameters = given_parameters(config)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise CheckpointError("RoPE parameters by kind of layer are not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in SUPPORTED:
        raise CheckpointError(f"RoPE scaling of type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    if _first(parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1) != 1:
        raise CheckpointError("partial_rotary_factor other than 1 is not supported")
    theta = _number(parameters, "rope_theta", kind, _first(config.get("rope_theta"), _DEFAULT_THETA))
    if theta <= 1:
        raise CheckpointError(f"rope_theta must be above 1, not {theta}")
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (np.float32(1.0) / np.power(np.float32(theta), exponent)).astype(np.float32)
    scale, limit = 1.0, max_position
    if kind == "linear":
        factor = _number(parameters, "factor", kind)
        with np.errstate(over="ignore"):  # looked at below
            inv_freq = inv_freq / np.float32(factor)
        limit = int(max_position * factor)
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, parameters)
        limit = max(max_position, int(_number(parameters, "original_max_position_embeddings", kind)))
    elif kind == "yarn":
        original = _number(parameters, "original_max_position_embeddings", kind, max_position)
        implied = max_position / original if "original_max_position_embeddings" in parameters else None
        factor = _number(parameters, "factor", kind, implied)
        inv_freq = _yarn(inv_freq, parameters, theta, head_dim, factor, original)
        scale = _yarn_scale(parameters, factor)
        limit = max(max_position, int(original * factor))
    if not np.isfinite(inv_freq).all():
        raise CheckpointError(f"RoPE scaling of type {kind!r} gives no finite frequencies: {parameters}")
    return Rope(tuple(float(f) for f in inv_freq.astype(np.float32)), scale, limit)


def given_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `rope_parameters` or `rope_scaling`, with the original length that may stand beside them.

    Raises CheckpointError where both are there and differ: a scaling that was written into a config of transformers 5
    by a recipe for an older one, whose meaning versions do not agree on.
    """
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for part in (new, old):
        if not isinstance(part, Mapping):
            raise CheckpointError(f"the RoPE parameters must be an object, not {part!r}")
    if new and old and _meaning(new) != _meaning(old):
        raise CheckpointError(
            f"rope_parameters {dict(new)} and rope_scaling {dict(old)} differ; move what is meant into "
            "rope_parameters, and remove rope_scaling"
        )
    given = new or old
    original = config.get("original_max_position_embeddings")  # as in transformers, it wins
    return dict(given) if original is None else {**given, "original_max_position_embeddings": original}


def _meaning(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling without theta, which may stand elsewhere."""
    apart = ("type", "rope_type", "rope_theta")
    rest = {key: value for key, value in parameters.items() if key not in apart and value is not None}
    return rest | {"type": parameters.get("rope_type", parameters.get("type", "default"))}


def _first(*values: Any) -> Any:
    """The first of `values` that is given."""
    return next((value for value in values if value is not None), None)


def _number(parameters: Mapping[str, Any], key: str, kind: str, default: Any = None) -> float:
    value = _first(parameters.get(key), default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
        raise CheckpointError(f"RoPE scaling of type {kind!r} needs a positive number {key!r}, not {value!r}")
    return float(value)


def _llama3(inv_freq: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    factor = _number(parameters, "factor", "llama3")
    low = _number(parameters, "low_freq_factor", "llama3")
    high = _number(parameters, "high_freq_factor", "llama3")
    original = _number(parameters, "original_max_position_embeddings", "llama3")
    if high <= low:
        raise CheckpointError(
            f"RoPE scaling of type 'llama3' needs high_freq_factor ({high}) above low_freq_factor ({low})"
        )
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq
    slowed = np.where(wavelength > original / low, inv_freq / np.float32(factor), inv_freq)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(between, blended, slowed)


def _yarn(
    inv_freq: np.ndarray, parameters: Mapping[str, Any], theta: float, head_dim: int, factor: float, original: float
) -> np.ndarray:
    """Interpolate (divide by `factor`) below `beta_slow` rotations, extrapolate (keep) above `beta_fast`."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(_number(parameters, "beta_fast", "yarn", 32))
    high = dimension(_number(parameters, "beta_slow", "yarn", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return inv_freq / np.float32(factor) * ramp + inv_freq * (1 - ramp)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor", "yarn")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(_number(parameters, "mscale", "yarn")) / mscale(_number(parameters, "mscale_all_dim", "yarn"))
    return mscale(1.0)
