"""Matrices in 8 or 4 bits: codes, scales and zero points of groups of input channels.

Input channels of a row are cut into groups; each has one float32 scale and one zero point (an integer code), and

    value = (code - zero) * scale

Symmetric groups have the zero point 2^(bits-1). Scales are numbers that bfloat16 can hold, so that kernels may read
them at half the bytes and mean the same. Rows are padded to whole groups with zeros. What is chosen here is
numbers; how they lie in a file is `pack` (MatMulNBits' layout) or the business of whoever packs for other kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a matrix [N, K] as integers, one code a byte whatever the number of bits."""

    codes: UInt8Array
    """[N, groups, group_size]; channels past `columns` are padding and stand for 0."""
    scales: Float32Array
    """[N, groups]"""
    zeros: UInt8Array | None
    """[N, groups] code that stands for 0 in each group; None: 2^(bits-1) in all."""
    bits: int
    columns: int
    """K"""

    def values(self) -> Float32Array:
        """The float32 [N, K] that the codes stand for."""
        values = self.codes.astype(np.float32)
        values -= np.float32(1 << self.bits - 1) if self.zeros is None else self.zeros.astype(np.float32)[:, :, None]
        values *= self.scales[:, :, None]
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, : self.columns])


def quantize_rows(rows: Float32Array, bits: int, group_size: int, zero_points: bool = False) -> QuantizedRows:
    """Round float32 [N, K] to nearest.

    Symmetric, 4 bits: the number of largest magnitude lands on -8, whichever its sign (the scale carries it), so
    all 16 levels serve. Symmetric, 8 bits: it lands on +-127. With zero points a group's levels go from its
    smallest number (or 0) to its largest (or 0).
    """
    grouped = group_columns(rows, group_size)
    scales, zeros = choose_scales(grouped, bits, zero_points)
    return QuantizedRows(round_to_codes(grouped, scales, zeros, bits), scales, zeros, bits, rows.shape[1])


def group_columns(rows: Float32Array, group_size: int) -> Float32Array:
    """[N, K] as [N, groups, group_size], padded with zeros."""
    count, columns = rows.shape
    groups = -(-columns // group_size)
    if columns != groups * group_size:
        rows = np.pad(rows, ((0, 0), (0, groups * group_size - columns)))
    return rows.reshape(count, groups, group_size)


def choose_scales(
    grouped: Float32Array, bits: int, zero_points: bool, shrink: float = 1.0
) -> tuple[Float32Array, UInt8Array | None]:
    """Scales [N, groups] and zero points for numbers [N, groups, group_size].

    The range of the codes is that of a group's numbers times `shrink`: below 1, its largest numbers are cut off.
    """
    factor = np.float32(shrink)
    top, bottom = grouped.max(axis=2) * factor, grouped.min(axis=2) * factor
    if zero_points:
        levels = np.float32((1 << bits) - 1)
        top, bottom = np.maximum(top, 0), np.minimum(bottom, 0)
        scales = usable_scales(top / levels - bottom / levels)
        zeros = np.clip(np.rint(-bottom * inverse(scales)), 0, levels)
        return scales, zeros.astype(np.uint8)
    if bits == 4:
        return usable_scales(np.where(-bottom >= top, bottom, top) * np.float32(-1 / 8)), None
    return usable_scales(np.maximum(top, -bottom) * np.float32(1 / 127)), None


def usable_scales(scales: Float32Array) -> Float32Array:
    """The nearest numbers of bfloat16; 0 for those that have no finite inverse: such a group is stored as zeros."""
    scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    scales[~np.isfinite(inverse(scales))] = 0
    return scales


def round_to_codes(grouped: Float32Array, scales: Float32Array, zeros: UInt8Array | None, bits: int) -> UInt8Array:
    """Nearest codes [N, groups, group_size] of numbers [N, groups, group_size] under given scales."""
    levels = grouped * inverse(scales)[:, :, None]
    np.rint(levels, out=levels)
    levels += np.float32(1 << bits - 1) if zeros is None else zeros.astype(np.float32)[:, :, None]
    np.clip(levels, 0, (1 << bits) - 1, out=levels)
    return levels.astype(np.uint8)


def inverse(scales: Float32Array) -> Float32Array:
    """1 / scale, and 0 where the scale is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scales == 0, np.float32(0), np.float32(1) / scales)


def pack(codes: UInt8Array, bits: int) -> UInt8Array:
    """Codes [..., n] as bytes [..., ceil(n * bits / 8)]: at 4 bits two share a byte, the even one in the low half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate((codes, np.zeros_like(codes[..., :1])), axis=-1)
    packed: UInt8Array = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def unpack(packed: UInt8Array, bits: int, count: int) -> UInt8Array:
    """The `count` codes [..., count] of what `pack` made."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = packed & np.uint8(15)
    codes[..., 1::2] = packed >> np.uint8(4)
    return codes[..., :count]
