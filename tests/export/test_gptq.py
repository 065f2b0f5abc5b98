"""Error compensation: it lowers the error of outputs, and it is what GPTQ's equations say."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from apar.export import gptq
from apar.export.gptq import gptq_rows, output_error, search_scales
from apar.export.quantize import choose_scales, group_columns, quantize_rows, round_to_codes

FORMATS = [(4, 32, False), (4, 128, False), (4, 32, True), (4, 64, True), (8, 32, False), (8, 128, True)]


def layer(seed: int = 0, rows: int = 48, columns: int = 160, tokens: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and inputs as a layer has them: correlated, a few channels much larger than the others."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(0, 1, (24, columns)) * rng.lognormal(0, 1, columns)
    inputs = rng.normal(0, 1, (tokens, 24)) @ mix + rng.normal(0, 0.1, (tokens, columns))
    return rng.normal(0, 0.05, (rows, columns)).astype(np.float32), inputs.astype(np.float32)


def hessian(inputs: np.ndarray) -> np.ndarray:
    return inputs.T @ inputs / np.float32(len(inputs))


@pytest.mark.parametrize(("bits", "group", "zero_points"), FORMATS)
@pytest.mark.parametrize("columns", [160, 100, 32])
def test_outputs_are_closer_than_with_rounding(bits: int, group: int, zero_points: bool, columns: int) -> None:
    for seed in range(3):
        rows, inputs = layer(seed, columns=columns)
        seen, unseen = inputs[:500], inputs[500:]
        rounded = quantize_rows(rows, bits, group, zero_points).values()
        compensated = gptq_rows(rows, hessian(seen), bits, group, zero_points)
        assert compensated.codes.shape == (48, -(-columns // group), group)
        for part, factor in ((seen, 0.5), (unseen, 0.6)):
            error = [np.square(part @ (rows - w).T).mean() for w in (rounded, compensated.values())]
            assert error[1] < factor * error[0]


def test_output_error_is_that_of_the_outputs() -> None:
    rows, inputs = layer()
    changed = quantize_rows(rows, 4, 32).values()
    expected = np.square(inputs @ (rows - changed).T).sum() / np.square(inputs @ rows.T).sum()
    assert output_error(rows, changed, hessian(inputs)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("bits", "group", "zero_points"), FORMATS)
def test_inputs_that_are_independent_leave_nothing_to_compensate(bits: int, group: int, zero_points: bool) -> None:
    rows, _ = layer()
    importance = np.random.default_rng(1).uniform(0.5, 2, rows.shape[1]).astype(np.float32)
    got = gptq_rows(rows, np.diag(importance), bits, group, zero_points)
    grouped = group_columns(rows, group)
    damped = importance + np.float32(gptq.DAMPING) * importance.mean()
    scales, zeros = search_scales(grouped, bits, zero_points, damped)
    assert np.array_equal(got.scales, scales)
    codes, expected = got.codes.astype(int), round_to_codes(grouped, scales, zeros, bits).astype(int)
    assert np.array_equal(codes, expected)


def test_matches_the_equations_in_float64() -> None:
    """GPTQ written down naively: after each channel the rest moves by the column of the inverse Hessian."""
    rows, inputs = layer(rows=6, columns=96)
    weights, second = rows.astype(np.float64), hessian(inputs).astype(np.float64)
    got = gptq_rows(rows, hessian(inputs), 4, 32)
    scales = np.repeat(got.scales, 32, axis=1).astype(np.float64)
    second[np.diag_indices_from(second)] += gptq.DAMPING * np.diagonal(second).mean()
    order = list(np.argsort(-np.diagonal(hessian(inputs)), kind="stable"))
    codes = np.zeros(rows.shape, int)
    while order:
        channel = order[0]
        codes[:, channel] = np.clip(np.rint(weights[:, channel] / scales[:, channel]), -8, 7) + 8
        inverse = np.linalg.inv(second[np.ix_(order, order)])
        error = (weights[:, channel] - (codes[:, channel] - 8) * scales[:, channel]) / inverse[0, 0]
        weights[:, order] -= error[:, None] * inverse[0]
        order.pop(0)
    differ = np.mean(codes != got.codes.reshape(6, -1).astype(int))
    assert differ < 0.05  # float32 decides a few ties otherwise, and what follows them


def test_inverse_factor() -> None:
    second = hessian(layer(columns=200)[1])
    order = np.random.default_rng(2).permutation(200)
    upper = gptq._inverse_factor(second, order)
    assert upper is not None
    assert np.array_equal(upper, np.triu(upper))
    damped = second.astype(np.float64) + np.eye(200) * gptq.DAMPING * np.diagonal(second).mean(dtype=np.float64)
    product = upper.T.astype(np.float64) @ upper @ damped[np.ix_(order, order)]
    assert np.abs(product - np.eye(200)).max() < 1e-2


@pytest.mark.parametrize(("bits", "group", "zero_points"), FORMATS)
def test_searched_scales_are_never_worse(bits: int, group: int, zero_points: bool) -> None:
    rows, inputs = layer()
    grouped, importance = group_columns(rows, group), np.diagonal(hessian(inputs)).copy()
    weight = np.zeros(grouped.shape[1] * group, np.float32)
    weight[: importance.size] = importance

    def error(scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
        codes = round_to_codes(grouped, scales, zeros, bits).astype(np.float32)
        codes -= np.float32(1 << bits - 1) if zeros is None else zeros[:, :, None].astype(np.float32)
        return (np.square(codes * scales[:, :, None] - grouped) * weight.reshape(-1, group)).sum(2)

    plain = error(*choose_scales(grouped, bits, zero_points))
    searched = error(*search_scales(grouped, bits, zero_points, importance))
    assert np.all(searched <= plain * (1 + 1e-5))
    assert searched.sum() < plain.sum()


def test_channels_without_inputs_are_rounded() -> None:
    rows, inputs = layer()
    inputs[:, 10:40] = 0
    got = gptq_rows(rows, hessian(inputs), 4, 32)
    errors = [np.square(q.values() - rows)[:, 10:40].mean() for q in (quantize_rows(rows, 4, 32), got)]
    assert errors[1] < 3 * errors[0]  # other channels of their groups choose the scales
    assert output_error(rows, got.values(), hessian(inputs)) < 0.01


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_degenerate_inputs_fall_back_to_rounding(value: float, caplog: pytest.LogCaptureFixture) -> None:
    rows, _ = layer()
    with caplog.at_level(logging.WARNING):
        got = gptq_rows(rows, np.full((160, 160), value, np.float32), 4, 32)
    assert "rounded to nearest" in caplog.text
    assert np.array_equal(got.codes, quantize_rows(rows, 4, 32).codes)


def test_fewer_tokens_than_channels() -> None:
    rows, inputs = layer(tokens=20)
    got = gptq_rows(rows, hessian(inputs), 4, 32)
    rounded = quantize_rows(rows, 4, 32)
    assert np.isfinite(got.values()).all()
    errors = [output_error(rows, q.values(), hessian(inputs)) for q in (rounded, got)]
    assert errors[1] < 0.5 * errors[0]
    # What no token showed must not be destroyed.
    assert np.square(got.values() - rows).mean() < 4 * np.square(rounded.values() - rows).mean()
