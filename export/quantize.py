"""Symmetric round-to-nearest quantisation in the layout of ONNX Runtime's MatMulNBits.

Input channels of a row are cut into groups; each has one float32 scale, and its numbers are stored as
unsigned integers around 2^(bits-1): value = (q - 2^(bits-1)) * scale. At 4 bits two numbers share a byte,
the even channel in the low half. Rows are padded to whole groups with zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (16, 32, 64, 128, 256)


def quantize_rows(rows: Float32Array, bits: int, group_size: int) -> tuple[UInt8Array, Float32Array]:
    """Quantise float32 [N, K] to bytes [N, groups, group_size * bits / 8] and scales [N, groups].

    4 bits: the number of largest magnitude lands on -8, whichever its sign (the scale carries it), so all
    16 levels serve. 8 bits: it lands on +-127.
    """
    count, columns = rows.shape
    groups = -(-columns // group_size)
    if columns != groups * group_size:
        rows = np.pad(rows, ((0, 0), (0, groups * group_size - columns)))
    grouped = rows.reshape(count, groups, group_size)
    top, bottom = grouped.max(axis=2), grouped.min(axis=2)
    if bits == 4:
        scales = np.where(-bottom >= top, bottom, top) * np.float32(-1 / 8)
        zero, high = np.float32(8), np.float32(15)
    else:
        scales = np.maximum(top, -bottom) * np.float32(1 / 127)
        zero, high = np.float32(128), np.float32(255)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    # A group of subnormal numbers has no finite inverse; it is stored as zeros.
    tiny = ~np.isfinite(inverse)
    scales[tiny], inverse[tiny] = 0, 0
    levels = grouped * inverse[:, :, None]
    np.rint(levels, out=levels)
    levels += zero
    np.clip(levels, 0, high, out=levels)
    packed = levels.astype(np.uint8)
    if bits == 4:
        packed = packed[:, :, 0::2] | (packed[:, :, 1::2] << np.uint8(4))
    return packed, scales


def dequantize_rows(packed: UInt8Array, scales: Float32Array, bits: int, columns: int) -> Float32Array:
    """The float32 [N, columns] that `quantize_rows` output stands for."""
    if bits == 4:
        levels = np.empty((*packed.shape[:2], packed.shape[2] * 2), np.float32)
        levels[:, :, 0::2] = packed & np.uint8(15)
        levels[:, :, 1::2] = packed >> np.uint8(4)
        levels -= np.float32(8)
    else:
        levels = packed.astype(np.float32)
        levels -= np.float32(128)
    levels *= scales[:, :, None]
    return np.ascontiguousarray(levels.reshape(len(packed), -1)[:, :columns])
