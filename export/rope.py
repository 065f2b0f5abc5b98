"""Inverse frequencies of rotary position embedding, with the scaling types of Llama checkpoints.

Formulas: RoFormer (arXiv 2104.09864), position interpolation (arXiv 2306.15595), Llama 3.1's wavelength
bands, YaRN (arXiv 2309.00071). All of them leave one fixed vector of frequencies; "dynamic" does not,
since its frequencies change with the length of the sequence, and cached keys would have to be turned again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apar.export.errors import CheckpointError

SUPPORTED = ("default", "linear", "llama3", "yarn")
_DEFAULT_THETA = 10000.0


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
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: the RoPE parameters must be an object, not {given!r}")
    parameters = dict(given)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in SUPPORTED:
        raise CheckpointError(
            f"config.json: RoPE scaling of type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    if float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (np.float32(1.0) / np.power(np.float32(theta), exponent)).astype(np.float32)
    scale, limit = 1.0, max_position
    if kind == "linear":
        factor = _number(parameters, "factor", kind)
        inv_freq = inv_freq / np.float32(factor)
        limit = int(max_position * factor)
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, parameters)
        limit = max(max_position, int(_number(parameters, "original_max_position_embeddings", kind)))
    elif kind == "yarn":
        original = float(parameters.get("original_max_position_embeddings") or max_position)
        factor = float(parameters.get("factor") or max_position / original)
        inv_freq = _yarn(inv_freq, parameters, theta, head_dim, factor, original)
        scale = _yarn_scale(parameters, factor)
        limit = max(max_position, int(original * factor))
    return Rope(tuple(float(f) for f in inv_freq.astype(np.float32)), scale, limit)


def _number(parameters: Mapping[str, Any], key: str, kind: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(
            f"config.json: RoPE scaling of type {kind!r} needs a positive number {key!r}, not {value!r}"
        )
    return float(value)


def _llama3(inv_freq: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    factor = _number(parameters, "factor", "llama3")
    low = _number(parameters, "low_freq_factor", "llama3")
    high = _number(parameters, "high_freq_factor", "llama3")
    original = _number(parameters, "original_max_position_embeddings", "llama3")
    if high <= low:
        raise CheckpointError(
            f"config.json: RoPE scaling of type 'llama3' needs high_freq_factor ({high}) above low_freq_factor ({low})"
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

    low = dimension(float(parameters.get("beta_fast") or 32))
    high = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return inv_freq / np.float32(factor) * ramp + inv_freq * (1 - ramp)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(float(over)) / mscale(float(under)) if over and under else mscale(1.0)
