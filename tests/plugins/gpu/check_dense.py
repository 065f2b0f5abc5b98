"""The dense kernels in Triton's interpreter, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from apar.export.errors import ExecutorError
from apar.plugins.gpu.dense import Matrix, add_norm, embed, selected_norm, silu_mul


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize("hidden", [64, 320, 1100])
def test_norms(hidden: int) -> None:
    torch.manual_seed(hidden)
    update, weight = torch.randn(5, hidden).bfloat16(), torch.randn(hidden).bfloat16()
    residual = torch.randn(5, hidden)
    before = residual.clone()
    out = torch.full((5, hidden), float("nan"))
    add_norm(None, residual, weight, 1e-5, out)
    torch.testing.assert_close(out, norm(before, weight.float()))
    assert torch.equal(residual, before)
    add_norm(update, residual, weight, 1e-5, out)
    torch.testing.assert_close(residual, before + update)
    torch.testing.assert_close(out, norm(before + update, weight.float()))
    rows = torch.tensor([4, 0, 4], dtype=torch.int32)
    chosen = selected_norm(update, residual, weight, 1e-5, rows, torch.full((3, hidden), float("nan")))
    torch.testing.assert_close(chosen, norm(residual + update, weight.float())[rows.long()])


@pytest.mark.parametrize("width", [112, 1500])
def test_embedding_and_activation(width: int) -> None:
    table, residual = torch.randn(9, width).half(), torch.full((4, width), float("nan"))
    ids = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
    embed(ids, table, residual)
    assert torch.equal(residual, table.float()[ids.long()])
    gate_up = torch.randn(3, 2 * width)
    gate, up = gate_up.chunk(2, -1)
    out = silu_mul(gate_up, torch.full((3, width), float("nan")))
    torch.testing.assert_close(out, functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_products_are_those_of_the_rounded_weights(form: str, dtype: torch.dtype) -> None:
    """Exact in the weights: only the sums' order and the result's type differ."""
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 200) * torch.logspace(-3, 3, 70)[:, None], torch.randn(70)
    weight[3] = 0
    matrix = Matrix.of(weight, bias, dtype, form)
    assert matrix.scale is not None
    if form == "int8":
        rounded = matrix.weight.float() * matrix.scale[:, None]
    else:
        rounded = matrix.weight.view(torch.float8_e4m3fn).float() * (matrix.scale / 256)[:, None]
    x = torch.randn(3, 200).to(dtype)
    expected = x.double() @ rounded.double().T + bias.to(dtype)
    out = matrix(x)
    assert out.dtype == dtype
    size = x.double().abs() @ rounded.double().abs().T + bias.abs()
    # The interpreter cuts float32 off to bfloat16, where a GPU rounds.
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert ((out - expected).abs() / size).max() < bound
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("form", "low", "high"), [("int8", 0.003, 0.012), ("fp8", 0.015, 0.035)])
def test_error_of_8_bits(form: str, low: float, high: float) -> None:
    """Relative error of Gaussian weights (root mean square): what docs/gpu.md states."""
    torch.manual_seed(1)
    weight = torch.randn(64, 4096)
    matrix = Matrix.of(weight, None, torch.float32, form)
    assert matrix.scale is not None
    if form == "int8":
        rounded = matrix.weight.float() * matrix.scale[:, None]
    else:
        rounded = matrix.weight.view(torch.float8_e4m3fn).float() * (matrix.scale / 256)[:, None]
    error = float((rounded - weight).square().mean().sqrt() / weight.square().mean().sqrt())
    assert low < error < high


def test_many_rows_take_wide_tiles() -> None:
    torch.manual_seed(2)
    weight = torch.randn(40, 70)
    matrix = Matrix.of(weight, None, torch.float32, "int8")
    assert matrix.scale is not None
    x = torch.randn(130, 70)
    torch.testing.assert_close(matrix(x), x @ (matrix.weight.float() * matrix.scale[:, None]).T, rtol=1e-4, atol=1e-4)
    assert matrix.bytes == 40 * 70 + 4 * 40


def test_16_bits_and_logits() -> None:
    weight, x = torch.randn(6, 10), torch.randn(2, 10).bfloat16()
    matrix = Matrix.of(weight, None, torch.bfloat16, "16bit")
    logits = matrix.float32(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.bfloat16().float().T)
    out = torch.empty(2, 6)
    assert matrix.float32(x, out) is out and torch.equal(out, logits)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ExecutorError, match="int4"):
        Matrix.of(torch.zeros(2, 2), None, torch.float32, "int4")
