"""Sampling where the logits are, in PyTorch, against sampling on the host: the same tokens from the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from apar.export.errors import ExecutorError
from apar.export.manifest import TokenIds
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.executor.cuda.sampling import TorchLogits
from apar.runtime.sampler import FAILED_TOKEN, Sampler, SampleResult
from apar.runtime.sampling_params import SamplingParams

VOCAB, PADDED = 3000, 3008
TOKENS = TokenIds(fork=2998, child=2999, eos=(2, 3), bos=1, pad=0)

PLAIN = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 50},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.3, "min_p": 0.2, "top_p": 0.9, "top_k": 200},
    {"temperature": 1.0, "ignore_eos": True},
    {"temperature": 0.0, "ignore_eos": True},
]
RULED = [
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "logit_bias": {5: 9.0}},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 0.0, "min_tokens": 8},
]


def sample_both(
    params: list[dict[str, Any]], logits: np.ndarray, banned: np.ndarray, counters: np.ndarray
) -> tuple[SampleResult, SampleResult]:
    results = []
    for on_device in (False, True):
        sampler = Sampler(VOCAB, TOKENS, len(params))
        paths = np.zeros((len(params), 8), np.int32)
        paths[:, :3] = [1, 40, 5]
        for slot, given in enumerate(params):
            sampler.attach(slot, sampler.prepare(SamplingParams(**given)), key=slot * 977 + 5, prompt_tokens=2)
        given_logits: Any = TorchLogits(torch.from_numpy(logits.copy())) if on_device else logits.copy()
        assert isinstance(given_logits, DeviceLogits) == on_device
        slots = np.arange(len(params), dtype=np.int64)
        lengths = np.full(len(params), 3, np.int32)
        results.append(sampler.sample(given_logits, slots, paths, lengths, counters, banned))
    return results[0], results[1]


@pytest.mark.parametrize("seed", range(12))
def test_device_and_host_sample_the_same(seed: int) -> None:
    random = np.random.default_rng(seed)
    pools = [PLAIN, [PLAIN[3], PLAIN[4]], PLAIN + RULED, [PLAIN[0]]]
    params = [pools[seed % 4][i] for i in random.integers(0, len(pools[seed % 4]), 40)]
    logits = (random.standard_normal((40, PADDED)) * 3).astype(np.float32)
    if seed % 2:
        logits = np.round(logits)  # ties, which go to the lowest id
    logits[:, TOKENS.child] += 5
    logits[:, TOKENS.fork] += 6
    counters = random.integers(0, 30, 40).astype(np.int32)
    host, device = sample_both(params, logits, random.random(40) < 0.5, counters)
    np.testing.assert_array_equal(device.tokens, host.tokens)
    assert device.failed == host.failed == ()
    np.testing.assert_array_equal(device.denied, host.denied)
    assert device.logprobs.keys() == host.logprobs.keys()
    for row, entry in host.logprobs.items():
        assert device.logprobs[row] == entry


def test_rows_that_cannot_be_sampled_fail_alone() -> None:
    random = np.random.default_rng(3)
    params = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "repetition_penalty": 1.2}] * 4
    logits = random.standard_normal((12, PADDED)).astype(np.float32)
    logits[1, 17] = np.nan
    logits[3, 4] = np.inf
    logits[5, TOKENS.child] = np.nan
    logits[6] = -np.inf
    logits[8, 9] = -np.inf
    logits[9, VOCAB:] = np.nan
    host, device = sample_both(params, logits, np.zeros(12, bool), np.zeros(12, np.int32))
    assert host.failed == device.failed == (1, 3, 5, 6)
    np.testing.assert_array_equal(device.tokens, host.tokens)
    assert (device.tokens[list(device.failed)] == FAILED_TOKEN).all()


def test_denials_are_those_of_the_host() -> None:
    """[Fork] banned or not, the likeliest or not, tied with the likeliest, in rows that fail and in rows with rules."""
    logits = np.zeros((7, PADDED), np.float32)
    logits[:, 9] = 4.0
    logits[[0, 1, 4, 5, 6], TOKENS.fork] = 5.0
    logits[3, TOKENS.fork] = 4.0
    logits[5, 11] = np.nan
    logits[6, TOKENS.child] = 6.0  # banned everywhere, so [Fork] is the likeliest of what may come
    rules: list[dict[str, Any]] = [{"temperature": 0.0}] * 7
    rules[4] = {"temperature": 1.0, "repetition_penalty": 1.2}
    banned = np.array([True, False, True, True, True, True, True])
    host, device = sample_both(rules, logits, banned, np.zeros(7, np.int32))
    assert host.denied.tolist() == device.denied.tolist() == [0, 4, 6]
    assert host.failed == device.failed == (5,)


def test_wrong_shapes_are_refused() -> None:
    sampler = Sampler(VOCAB, TOKENS, 2)
    empty = np.zeros((2, 4), np.int32)
    with pytest.raises(ExecutorError, match="belies"):
        sampler.sample(
            TorchLogits(torch.zeros(1, VOCAB)), np.arange(2), empty, empty[:, 0], empty[:, 0], np.zeros(2, bool)
        )
