"""apar::Linear against float64: every format, shapes that fill no vector, group or tile, every instruction set."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from fork_steps import available_isas
from linear_nodes import (
    FORMATS,
    Array,
    Format,
    as_integers,
    gated,
    normed,
    random_inputs,
    random_matrix,
    run,
    session,
)

from apar.export.linear_packing import (
    CHANNEL_MULTIPLE,
    TILE,
    pack_matrix,
    packed_shape,
    round_up,
    unpack_groups,
    unpack_matrix,
)

SHAPES = [(1, 1), (16, 32), (17, 33), (40, 250), (33, 515), (70, 768), (20, 2100)]
"""Output and input channels."""
TOKENS = (1, 2, 3, 4, 5, 7, 8, 13, 64, 67)
SOME_FORMATS = [Format("float32"), Format("bfloat16"), Format("int8"), Format("int4", 32), Format("int4", 128, True)]
KEYS = {"ids": str}


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("APAR_CPU_ISA", request.param)
    return str(request.param)


def close(y: Array, inputs: Array, values: Array, added: Array | float = 0.0) -> None:
    """Within float32's error of a sum of that many products of that size."""
    magnitude = np.abs(inputs) @ np.abs(values).T + np.abs(added) + 1e-30
    assert np.isfinite(y).all()
    assert np.abs((y - (inputs @ values.T + added)) / magnitude).max() < 3e-6


@pytest.mark.parametrize("form", FORMATS, **KEYS)
def test_against_float64(form: Format, isa: str) -> None:
    for out, columns in SHAPES:
        matrix = random_matrix(form, out, columns)
        node = session(matrix)
        for tokens in TOKENS:
            x = random_inputs(tokens, columns)
            y = run(node, x)
            assert y.shape == (tokens, out)
            close(y, as_integers(x, form), matrix.values)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.bits], **KEYS)
def test_inputs_as_integers_cost_little(form: Format, isa: str) -> None:
    """Against inputs that are not rounded at all: no more than half a step of each."""
    matrix = random_matrix(form, 64, 700)
    x = random_inputs(9, 700)
    units = np.pad(np.abs(x), ((0, 0), (0, -700 % form.unit))).reshape(9, -1, form.unit).max(axis=2)
    step = np.repeat(units, form.unit, axis=1)[:, :700] / (32767 if form.bits == 8 else 127)
    exact = x.astype(np.float64) @ matrix.values.T
    assert (np.abs(run(session(matrix), x) - exact) <= 0.51 * step @ np.abs(matrix.values).T + 1e-5).all()


@pytest.mark.parametrize("form", SOME_FORMATS, **KEYS)
@pytest.mark.parametrize("columns", [37, 256, 515])
def test_what_stands_around_it(form: Format, columns: int, isa: str) -> None:
    out, tokens = 45, 6
    random = np.random.default_rng(2)
    matrix = random_matrix(form, out, columns)
    bias, residual = (random.standard_normal(shape).astype(np.float32) for shape in (out, (tokens, out)))
    norm = random.uniform(0.5, 2, columns).astype(np.float32)
    x = random_inputs(tokens, columns)
    half_step = {0: 2e-6, 8: 4e-5, 4: 1e-2}[form.bits]
    for optional, inputs, changes, values in (
        ({"bias": bias}, x, {}, x.astype(np.float64)),
        ({"residual": residual}, x, {}, x.astype(np.float64)),
        ({"norm": norm}, x, {}, normed(x, norm)),
        ({"norm": norm, "bias": bias, "residual": residual}, x, {}, normed(x, norm)),
        ({"bias": bias, "residual": residual}, np.hstack([x, x[::-1]]), {"gated": 1}, gated(np.hstack([x, x[::-1]]))),
    ):
        y = run(session(matrix, optional, **changes), inputs, optional.get("residual"))
        added = optional.get("bias", 0.0) + optional.get("residual", 0.0)
        rounded = as_integers(values.astype(np.float32), form)
        # A value between two integers may fall either way, since the norm's own rounding is not the reference's.
        limit = np.abs(rounded) @ np.abs(matrix.values).T + np.abs(added)
        peak = np.abs(values).max() * np.abs(matrix.values).max()
        assert (np.abs(y - (rounded @ matrix.values.T + added)) <= 1e-5 * limit + half_step * peak).all()


@pytest.mark.parametrize("form", SOME_FORMATS, **KEYS)
def test_a_token_is_the_same_in_any_company(form: Format, isa: str) -> None:
    """Bit for bit: alone, among others, in any cut of a prefill, on one thread or several."""
    matrix = random_matrix(form, 600, 300)
    norm = {"norm": np.full(300, 0.5, np.float32)}
    x = random_inputs(141, 300)
    one, two = (session(matrix, norm, threads) for threads in (1, 2))
    expected = run(one, x)
    np.testing.assert_array_equal(run(two, x), expected)
    for cut in (1, 2, 3, 5, 8, 29, 64, 100):
        parts = [run(two, x[first : first + cut]) for first in range(0, len(x), cut)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(run(one, x[order]), expected[order])


@pytest.mark.parametrize("form", SOME_FORMATS, **KEYS)
def test_instruction_sets_agree(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = random_matrix(form, 50, 520), random_inputs(5, 520)
    found = []
    for isa in available_isas():
        monkeypatch.setenv("APAR_CPU_ISA", isa)
        found.append(run(session(matrix), x))
    magnitude = np.abs(x) @ np.abs(matrix.values).T
    for y in found[1:]:
        assert (np.abs(y - found[0]) / magnitude).max() < 3e-6


@pytest.mark.parametrize("form", SOME_FORMATS, **KEYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_harms_no_other(form: Format, bad: float, isa: str) -> None:
    matrix, x = random_matrix(form, 40, 300), random_inputs(6, 300)
    node = session(matrix)
    expected = run(node, x)
    x[2, 77] = bad
    y = run(node, x)
    assert not np.isfinite(y[2]).any()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[others], expected[others])


@pytest.mark.parametrize("form", SOME_FORMATS, **KEYS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-35, 1e30])
def test_inputs_of_extreme_size(form: Format, size: float, isa: str) -> None:
    matrix = random_matrix(form, 20, 64)
    x = (random_inputs(2, 64).astype(np.float64) * size).astype(np.float32)
    y = run(session(matrix), x)
    assert np.isfinite(y).all()
    exact = x.astype(np.float64) @ matrix.values.T
    # What is smaller than 1e-30 may count as nothing.
    atol = (0.02 * np.abs(x).max() + 1e-30) * np.abs(matrix.values).sum(axis=1).max()
    np.testing.assert_allclose(y, exact, rtol=0, atol=atol)


def test_no_tokens() -> None:
    matrix = random_matrix(Format("int4", 32), 24, 64)
    assert run(session(matrix), np.zeros((0, 64), np.float32)).shape == (0, 24)


# ---------------------------------------------------------------- layout


def test_layout_is_the_contracts() -> None:
    """Element by element, as plugins/linear.h words it."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((32, 8)).astype(np.float32)
    codes = random.integers(0, 16, (32, 16)).astype(np.uint8)
    bytes4 = codes[:, 0::2] | (codes[:, 1::2] << 4)
    floats, eights, fours = pack_matrix(rows), pack_matrix(codes, 8), pack_matrix(bytes4, 4)
    brain = pack_matrix(random_matrix(Format("bfloat16"), 32, 8).values.astype("bfloat16"))
    expected = random_matrix(Format("bfloat16"), 32, 8).values
    for n in range(32):
        tile, lane = divmod(n, TILE)
        for k in range(8):
            assert floats[tile, k, lane] == rows[n, k]
            assert float(brain[tile, k // 2, lane, k % 2]) == expected[n, k]
        for k in range(16):
            assert eights[tile, k // 4, lane, k % 4] == codes[n, k]
            assert fours[tile, k // 8, lane, k % 8 // 2] >> 4 * (k % 2) & 15 == codes[n, k]


@pytest.mark.parametrize("form", FORMATS, **KEYS)
def test_packing_can_be_undone(form: Format) -> None:
    matrix = random_matrix(form, 37, 301)
    columns = 301 if not form.bits else round_up(301, form.group_size or CHANNEL_MULTIPLE)
    assert matrix.weight.shape == packed_shape(37, columns, matrix.weight.dtype, form.bits)
    rows = unpack_matrix(matrix.weight, 37, 301, form.bits)
    if not form.bits:
        np.testing.assert_array_equal(rows.astype(np.float64), matrix.values)
        return
    assert matrix.scales is not None
    codes = rows if form.bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(37, -1)
    scales = unpack_groups(matrix.scales, 37).astype(np.float64)
    zeros = 2.0 ** (form.bits - 1) if matrix.zeros is None else unpack_groups(matrix.zeros, 37)[:, :, None] * 1.0
    values = (codes.reshape(37, scales.shape[1], -1) - zeros) * scales[:, :, None]
    np.testing.assert_array_equal(values.reshape(37, -1)[:, :301], matrix.values)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"abi_version": 2}, "the engine has ABI version 2, this library has 1; rebuild the engine with `apar build`"),
        ({"bits": 3}, "bits = 3 must be 4 or 8"),
        ({"group_size": 48}, "group_size = 48 does not suit the weight: int4 needs 16, 32, 64, 128 or 256"),
        ({"group_size": 0}, "group_size = 0 does not suit the weight"),
        ({"in_features": 0}, "in_features = 0 and out_features = 24 must be between 1 and"),
        ({"out_features": -3}, "in_features = 64 and out_features = -3 must be between 1 and"),
    ],
)
def test_bad_attributes(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=re.escape("Linear: " + sentence)):
        session(random_matrix(Format("int4", 32), 24, 64), **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"in_features": 65}, "x has shape [2, 64], it must be [T, 65]"),
        ({"gated": 1}, "x has shape [2, 64], it must be [T, 128]"),
        ({"out_features": 40}, "weight has shape [2, 8, 16, 4], it must have 1536 elements"),
        ({"bits": 8}, "weight has shape [2, 8, 16, 4], it must have 2048 elements"),
        ({"group_size": 64}, "scales has shape [2, 2, 16], it must have 32 elements"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], sentence: str) -> None:
    node = session(random_matrix(Format("int4", 32), 24, 64), **changes)
    with pytest.raises(Exception, match=re.escape("Linear: " + sentence)):
        run(node, np.zeros((2, 64), np.float32))


def test_optional_tensors_that_do_not_fit() -> None:
    matrix, x = random_matrix(Format("float16"), 24, 64), np.zeros((2, 64), np.float32)
    for optional, sentence in (
        ({"bias": np.zeros(23, np.float32)}, "bias has shape [23], it must have 24 elements"),
        ({"norm": np.zeros(24, np.float32)}, "norm has shape [24], it must have 64 elements"),
        ({"bias": np.zeros(24, np.float16)}, "bias has an element type that is not the contract's"),
        ({"residual": np.zeros((3, 24), np.float32)}, "residual has shape [3, 24], it must be [2, 24]"),
    ):
        with pytest.raises(Exception, match=re.escape("Linear: " + sentence)):
            run(session(matrix, optional), x, optional.get("residual"))
    with pytest.raises(Exception, match="Linear: inputs are either normed or gated, not both"):
        run(session(matrix, {"norm": np.ones(64, np.float32)}, gated=1), np.zeros((2, 128), np.float32))
