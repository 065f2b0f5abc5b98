"""A one-node session around the built library, and trees of branches to run steps of."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from reference import Array, Attributes, fork_attention

from apar.export.manifest import ABI_VERSION

INT_INPUTS = {
    "position_ids": ("T",),
    "query_start": ("R1",),
    "kv_len": ("R",),
    "block_table": ("R", "MB"),
    "slot_mapping": ("T",),
    "slot_copies": ("C", 2),
    "prefix_rows": ("G1",),
    "prefix_blocks": ("G",),
    "tree_mask": ("T", "W"),
}


@lru_cache(maxsize=1)
def library() -> str:
    """Path of the built library. Raises where there is none: these tests are about nothing else."""
    override = os.environ.get("APAR_PLUGIN_LIBRARY")
    if override:
        return override
    from apar.plugins import library_path

    return str(library_path())


@lru_cache(maxsize=1)
def entry_points() -> ctypes.CDLL:
    """The library's plain C functions."""
    handle = ctypes.CDLL(library())
    handle.apar_cpu_isa.restype = ctypes.c_char_p
    handle.apar_abi_version.restype = ctypes.c_int32
    return handle


def available_isas() -> list[str]:
    """Instruction sets of this machine, best first."""
    before = os.environ.get("APAR_CPU_ISA")
    found = []
    try:
        for isa in ("avx512_vnni", "avx512", "avx2", "generic"):
            os.environ["APAR_CPU_ISA"] = isa
            if entry_points().apar_cpu_isa() == isa.encode():
                found.append(isa)
    finally:
        if before is None:
            del os.environ["APAR_CPU_ISA"]
        else:
            os.environ["APAR_CPU_ISA"] = before
    return found


def node_attributes(attributes: Attributes, **changes: object) -> dict[str, object]:
    """Attributes of the node as the exporter writes them, with `changes`."""
    values: dict[str, object] = {
        "num_heads": attributes.num_heads,
        "num_kv_heads": attributes.num_kv_heads,
        "head_dim": attributes.head_dim,
        "block_size": attributes.block_size,
        "abi_version": ABI_VERSION,
        "scale": attributes.scale,
        "rope_inv_freq": [float(f) for f in attributes.rope_inv_freq],
        "rope_scale": attributes.rope_scale,
        "plugin_version": "1",
        "plugin_namespace": "",
    }
    return {**values, **changes}


def model(attributes: Attributes, **changes: object) -> bytes:
    """A graph of one ForkAttention node."""
    kv_type = TensorProto.FLOAT16 if attributes.kv_dtype == "float16" else TensorProto.FLOAT
    # Sizes stay symbolic where a graph would state them: the op's own checks are to be reached.
    pool = ["KV", "B", "K", "BS", "D"]
    inputs = [
        helper.make_tensor_value_info("qkv", TensorProto.FLOAT, ["T", "Q"]),
        helper.make_tensor_value_info("past_kv", kv_type, pool),
        *(helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in INT_INPUTS.items()),
    ]
    outputs = [
        helper.make_tensor_value_info("attn", TensorProto.FLOAT, ["T", attributes.num_heads * attributes.head_dim]),
        helper.make_tensor_value_info("present_kv", kv_type, pool),
    ]
    node = helper.make_node(
        "ForkAttention",
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain="apar",
        **node_attributes(attributes, **changes),
    )
    graph = helper.make_graph([node], "one_node", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("apar", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(attributes: Attributes, threads: int = 1, **changes: object) -> ort.InferenceSession:
    """A session of that graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(library())
    return ort.InferenceSession(model(attributes, **changes), options, providers=["CPUExecutionProvider"])


def run_in_place(run: ort.InferenceSession, inputs: dict[str, Array], pool: Array) -> npt.NDArray[np.float32]:
    """One step with past_kv and present_kv bound to `pool`'s own memory."""
    binding = run.io_binding()
    kept = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in inputs.values()]
    for name, value in zip(inputs, kept, strict=True):
        binding.bind_ortvalue_input(name, value)
    shared = ort.OrtValue.ortvalue_from_numpy(pool)
    assert shared.data_ptr() == pool.ctypes.data
    binding.bind_ortvalue_input("past_kv", shared)
    binding.bind_ortvalue_output("present_kv", shared)
    binding.bind_output("attn")
    run.run_with_iobinding(binding)
    return binding.get_outputs()[1].numpy()


@dataclass
class Branch:
    """A path's length and the blocks that hold its keys."""

    table: list[int] = field(default_factory=list)
    length: int = 0
    family: int = 0
    """Branches of one root are siblings and may share blocks."""


@dataclass
class Row:
    """What a step does for a branch: `count` new tokens, with a tree mask [count, W] or causally."""

    branch: Branch
    count: int = 1
    mask: npt.NDArray[np.uint32] | None = None
    padding: int = 0
    """Padding tokens behind the real ones; they count as keys that no real token sees."""


class Tree:
    """Branches over a kernel's pool and the reference's, which go through the same steps."""

    def __init__(self, attributes: Attributes, blocks: int, seed: int) -> None:
        self.attributes = attributes
        self.random = np.random.default_rng(seed)
        shape = (2, blocks, attributes.num_kv_heads, attributes.block_size, attributes.head_dim)
        # Whatever no step has written is NaN: it must never be used.
        self.pool = np.full(shape, np.nan, attributes.kv_dtype)
        self.expected_pool = np.full(shape, np.nan, attributes.kv_dtype)
        self.free = [int(block) for block in self.random.permutation(blocks)]
        self.copies: list[tuple[int, int]] = []
        self.families = 0

    def slot(self, branch: Branch, key: int) -> int:
        size = self.attributes.block_size
        return branch.table[key // size] * size + key % size

    def extend(self, branch: Branch, count: int) -> None:
        """Length and blocks for `count` more keys."""
        branch.length += count
        while len(branch.table) * self.attributes.block_size < branch.length:
            branch.table.append(self.free.pop())

    def root(self) -> Branch:
        self.families += 1
        return Branch(family=self.families)

    def fork(self, parent: Branch) -> Branch:
        """A child that shares the full blocks; the filled slots of the partial one are copied in the next step."""
        size = self.attributes.block_size
        full = parent.length // size
        child = Branch(parent.table[:full], full * size, parent.family)
        self.extend(child, parent.length - child.length)
        # Where the parent's own copy is still to come, its source is meant.
        origin = {target: source for source, target in self.copies}
        for key in range(full * size, parent.length):
            source = self.slot(parent, key)
            self.copies.append((origin.get(source, source), self.slot(child, key)))
        return child

    def inputs(self, rows: list[Row], share: bool = True) -> dict[str, Array]:
        """A step's inputs; extends the branches. Padding tokens hold NaN."""
        attributes = self.attributes
        positions: list[int] = []
        slots: list[int] = []
        start, lengths = [0], []
        words = max((row.mask.shape[1] for row in rows if row.mask is not None), default=0)
        mask: list[list[int]] = []
        for row in rows:
            before = row.branch.length
            self.extend(row.branch, row.count)
            positions += range(before, before + row.count)
            slots += [self.slot(row.branch, key) for key in range(before, before + row.count)]
            for i in range(row.count):
                bits = [0] * words
                if row.mask is not None:
                    bits[: row.mask.shape[1]] = [int(word) for word in row.mask[i]]
                else:
                    for j in range(min(i + 1, 32 * words)):
                        bits[j // 32] |= 1 << (j % 32)
                mask.append(bits)
            positions += [-1] * row.padding
            slots += [-1] * row.padding
            mask += [[0xFFFFFFFF] * words] * row.padding
            start.append(len(slots))
            lengths.append(row.branch.length + row.padding)
            # A padding token's key needs an entry in the table, any will do.
            while len(row.branch.table) * attributes.block_size < lengths[-1]:
                row.branch.table.append(self.free.pop())
        width = max(len(row.branch.table) for row in rows)
        table = [row.branch.table + [-1] * (width - len(row.branch.table)) for row in rows]
        qkv = self.random.standard_normal((len(slots), attributes.qkv_size), dtype=np.float32)
        qkv[np.array(slots) < 0] = np.nan
        groups, prefixes = [0], []
        for i, row in enumerate(rows):
            if share and i > 0 and row.branch.family == rows[i - 1].branch.family:
                common = 0
                while common < prefixes[-1] and table[i][common] == table[groups[-2]][common] >= 0:
                    common += 1
                prefixes[-1] = common
                groups[-1] = i + 1
            else:
                groups.append(i + 1)
                prefixes.append(len(row.branch.table))
        copies = np.array(self.copies, np.int32).reshape(-1, 2)
        self.copies = []
        return {
            "qkv": qkv,
            "position_ids": np.array(positions, np.int32),
            "query_start": np.array(start, np.int32),
            "kv_len": np.array(lengths, np.int32),
            "block_table": np.array(table, np.int32),
            "slot_mapping": np.array(slots, np.int32),
            "slot_copies": copies,
            "prefix_rows": np.array(groups if share else [0], np.int32),
            "prefix_blocks": np.array(prefixes if share else [], np.int32),
            "tree_mask": np.array(mask, np.uint32).reshape(len(slots), words).view(np.int32),
        }

    def step(self, run: ort.InferenceSession, rows: list[Row], share: bool = True) -> npt.NDArray[np.float32]:
        """Runs a step on the kernel and on the reference and compares."""
        return self.run(run, self.inputs(rows, share))

    def run(self, run: ort.InferenceSession, inputs: dict[str, Array]) -> npt.NDArray[np.float32]:
        expected = fork_attention(inputs, self.expected_pool, self.attributes)
        attn = run_in_place(run, inputs, self.pool)
        compare(attn, expected, self.attributes)
        return attn


def compare(attn: Array, expected: Array, attributes: Attributes) -> None:
    """float32: 1e-5 of the outputs' size. float16 pools: a rounding of K and V is 2^-11 of their size."""
    tolerance = 1e-5 if attributes.kv_dtype == "float32" else 3e-3
    assert np.isfinite(attn).all()
    np.testing.assert_allclose(attn, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=1.0))
