"""A cost model for tests."""

from __future__ import annotations

from apar.runtime.bench.cost_model import CostModel

UNIT = CostModel(
    name="unit",
    weight_bytes=1000.0,
    kv_bytes_per_token=1.0,
    memory_bytes_per_second=1.0,
    flops_per_token=0.0,
    flops_per_pair=0.0,
    overhead_seconds=5.0,
    kv_pool_tokens=4096,
)
"""A second is a byte: every duration is a whole number that can be worked out by hand."""
