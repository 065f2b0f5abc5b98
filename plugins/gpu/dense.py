"""The dense kernels as functions of tensors, and matrices of 16 and of 8 bits behind one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional

from apar.export.errors import ExecutorError
from apar.plugins.gpu.kernels import dense
from apar.plugins.gpu.launch import WIDE_LINEAR_STAGES

WEIGHT_FORMATS = ("16bit", "int8", "fp8")
_BLOCK = 1024
_FLOAT8_LARGEST = 448.0
_FLOAT8_SHIFT = 2.0**8
"""The kernel reads float8 as float16 with the same exponent bits: 2**-8 of the number."""


def embed(ids: Tensor, table: Tensor, residual: Tensor) -> None:
    """residual float32 [T, hidden] = table[ids] for int32 ids [T]."""
    hidden = table.shape[1]
    grid = (ids.shape[0], triton.cdiv(hidden, _BLOCK))
    dense.embed[grid](ids, table, residual, HIDDEN=hidden, BLOCK=_BLOCK)


def add_norm(update: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """residual [T, hidden] += update; `out` [T, hidden] = RMSNorm(residual) * weight."""
    return _norm(update, residual, weight, eps, out, None)


def selected_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float, rows: Tensor, out: Tensor) -> Tensor:
    """`out` [L, hidden] = RMSNorm(residual + update) * weight of the tokens `rows` int32 [L]."""
    return _norm(update, residual, weight, eps, out, rows)


def _norm(
    update: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, rows: Tensor | None
) -> Tensor:
    hidden = residual.shape[1]
    block = triton.next_power_of_2(hidden)
    dense.add_norm[(out.shape[0],)](
        residual if update is None else update,
        residual,
        weight,
        out,
        weight if rows is None else rows,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ADD=update is not None,
        SELECT=rows is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return out


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """`out` [T, ffn] = silu(gate) * up."""
    ffn = out.shape[1]
    dense.silu_mul[(out.shape[0], triton.cdiv(ffn, _BLOCK))](gate_up, out, FFN=ffn, BLOCK=_BLOCK)
    return out


@dataclass(frozen=True, slots=True)
class Matrix:
    """A projection: weight [N, K] of 16 bits, or of 8 with a scale for each of N outputs."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, form: str) -> Matrix:
        """Convert float32 `weight` [N, K]; `form` is one of WEIGHT_FORMATS, products are taken in `dtype`."""
        bias = None if bias is None else bias.to(dtype)
        if form == "16bit":
            return cls(weight.to(dtype), None, bias)
        if form not in WEIGHT_FORMATS:
            raise ExecutorError(f"weights must be one of {', '.join(WEIGHT_FORMATS)}, not {form!r}")
        largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        if form == "int8":
            scale = largest / 127.0
            return cls((weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale, bias)
        scale = largest / _FLOAT8_LARGEST
        codes = (weight / scale[:, None]).clamp(-_FLOAT8_LARGEST, _FLOAT8_LARGEST).to(torch.float8_e4m3fn)
        return cls(codes.view(torch.uint8), scale * _FLOAT8_SHIFT, bias)

    def values(self) -> Tensor:
        """float32 [N, K]: the numbers that are stored, as products see them."""
        if self.scale is None:
            return self.weight.float()
        if self.weight.dtype == torch.uint8:
            return self.weight.view(torch.float8_e4m3fn).float() * (self.scale / _FLOAT8_SHIFT)[:, None]
        return self.weight.float() * self.scale[:, None]

    @property
    def bytes(self) -> int:
        """Bytes that a step reads of it."""
        return sum(
            part.numel() * part.element_size() for part in (self.weight, self.scale, self.bias) if part is not None
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        if self.scale is None:
            return functional.linear(x, self.weight, self.bias)
        rows, columns, outputs = x.shape[0], x.shape[1], self.weight.shape[0]
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
        tile_m = min(128, max(16, triton.next_power_of_2(rows)))
        # Few rows: narrow tiles, so that many programs stream the weights. Many: wide ones, which reuse them.
        tile_n, tile_k = (32, 128) if rows <= 64 else (128, 64)
        stages = 4 if rows <= 64 else 3
        dense.linear8[(triton.cdiv(outputs, tile_n), triton.cdiv(rows, tile_m))](
            x,
            self.weight,
            self.scale,
            x if self.bias is None else self.bias,
            out,
            rows,
            N=outputs,
            K=columns,
            FLOAT8=self.weight.dtype == torch.uint8,
            BIAS=self.bias is not None,
            TILE_M=tile_m,
            TILE_N=tile_n,
            TILE_K=tile_k,
            num_warps=4 if rows <= 64 else 8,
            num_stages=WIDE_LINEAR_STAGES if x.dtype == torch.float32 else stages,
        )
        return out

    def float32(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, K] -> float32 [M, N], in `out` if given; not rounded to 16 bits, where x is not: for logits."""
        if x.device.type == "cuda" and x.dtype != torch.float32 and self.scale is None:
            if out is None:
                out = torch.empty((x.shape[0], self.weight.shape[0]), dtype=torch.float32, device=x.device)
            torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)
            return out if self.bias is None else out.add_(self.bias)
        if self.scale is not None:
            product = self(x).float()
        else:
            bias = None if self.bias is None else self.bias.float()
            product = functional.linear(x.float(), self.weight.float(), bias)
        return product if out is None else out.copy_(product)
