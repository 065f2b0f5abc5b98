"""Medusa heads by their definition, and a step to try them on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from apar.runtime.step import StepInputs


def one_row(tokens: list[int], wanted: list[int], block_size: int = 16) -> StepInputs:
    """A prefill of one row in blocks 0, 1, ..."""
    count = len(tokens)
    return StepInputs(
        input_ids=np.array(tokens, np.int32),
        position_ids=np.arange(count, dtype=np.int32),
        query_start=np.array([0, count], np.int32),
        kv_len=np.array([count], np.int32),
        block_table=np.arange(-(-count // block_size), dtype=np.int32)[None],
        slot_mapping=np.arange(count, dtype=np.int32),
        slot_copies=np.zeros((0, 2), np.int32),
        prefix_rows=np.array([0, 1], np.int32),
        prefix_blocks=np.zeros(1, np.int32),
        tree_mask=np.zeros((count, 0), np.int32),
        logits_rows=np.array(wanted, np.int32),
    )


def expect(model: LlamaForCausalLM, heads: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """[T, heads, vocab] by the definition of the heads."""
    with torch.inference_mode():
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        count = 1 + max(int(name.split(".")[0]) for name in heads)
        result = []
        for head in range(count):
            state, block = hidden, 0
            while f"{head}.{block}.linear.weight" in heads:
                name = f"{head}.{block}.linear"
                state = state + functional.silu(
                    functional.linear(state, heads[f"{name}.weight"], heads[f"{name}.bias"])
                )
                block += 1
            last = heads.get(f"{head}.{block}.weight")
            result.append(functional.linear(state, model.lm_head.weight if last is None else last))
        return torch.stack(result, 1)
