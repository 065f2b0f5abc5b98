"""RoPE frequencies against transformers, in both ways that configs write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import VARIANTS, make_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from apar.export.errors import CheckpointError
from apar.export.rope import rope_from_config

LLAMA3 = VARIANTS["rope_llama3"]["rope_parameters"]
YARN = VARIANTS["rope_yarn"]["rope_parameters"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
        YARN,
        YARN | {"attention_factor": 0.7},
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_equal_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    config = make_config(rope_parameters=parameters, head_dim=head_dim)
    expected = LlamaRotaryEmbedding(config)
    for form in (new_form(parameters), old_form(parameters, "rope_type"), old_form(parameters, "type")):
        rope = rope_from_config(form, head_dim, config.max_position_embeddings)
        np.testing.assert_allclose(rope.inv_freq, expected.inv_freq.numpy(), rtol=1e-6)
        assert rope.scale == pytest.approx(expected.attention_scaling)


def test_the_original_length_may_stand_beside_the_parameters() -> None:
    inside = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    beside = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64}
    both = {"rope_scaling": YARN | {"original_max_position_embeddings": 128}, "original_max_position_embeddings": 64}
    assert rope_from_config(inside, 16, 256) == rope_from_config(beside, 16, 256) == rope_from_config(both, 16, 256)
    with pytest.raises(CheckpointError, match="needs a positive number 'factor', not None"):
        rope_from_config({"rope_scaling": {"type": "yarn"}}, 16, 256)


def test_two_forms_that_differ_are_refused() -> None:
    plain, scaled = {"rope_type": "default", "rope_theta": 5e5}, {"type": "linear", "factor": 2.0}
    same = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_scaling": scaled}
    assert rope_from_config(same, 16, 256) == rope_from_config({"rope_theta": 5e5, "rope_scaling": scaled}, 16, 256)
    with pytest.raises(CheckpointError, match="differ; move what is meant into rope_parameters"):
        rope_from_config({"rope_parameters": plain, "rope_scaling": scaled}, 16, 256)


def new_form(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": parameters}


def old_form(parameters: dict[str, Any], key: str) -> dict[str, Any]:
    rest = {k: v for k, v in parameters.items() if k not in ("rope_type", "rope_theta")}
    scaling = None if parameters["rope_type"] == "default" else rest | {key: parameters["rope_type"]}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}


def test_theta_defaults_to_llamas() -> None:
    assert rope_from_config({}, 4, 2048).inv_freq == pytest.approx((1.0, 0.01))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048),  # exact up to here, another RoPE beyond
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}}, 4096),
    ],
)
def test_scaling_lengthens_the_context(config: dict[str, Any], limit: int) -> None:
    assert rope_from_config(config, 8, 2048).context_limit == limit
