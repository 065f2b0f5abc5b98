"""An engine's twin whose matrices go through ONNX Runtime's own kernels: the same codes, the same attention."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx

from apar.export.attention import ForkAttention
from apar.export.decoder import build_decoder
from apar.export.linear import PortableLinear
from apar.export.manifest import GRAPH_NAME, WEIGHTS_NAME, Manifest
from apar.export.weights_file import PackedWeight, PlainWeight, StoredWeight
from apar.runtime.engine_source import build_once


def stock_engine(engine: Path) -> Path:
    """The twin's directory, beside `engine`; its weights are those of `engine`, not a copy. Made once.

    Raises EngineError if `engine` is no engine, or its place cannot be written to.
    """
    target = engine.with_name(f"{engine.name}-stock")
    manifest = Manifest.load(engine)

    def build() -> None:
        weights = _stored_weights(onnx.load(engine / GRAPH_NAME, load_external_data=False).graph)
        attention = ForkAttention(manifest.block_size, manifest.kv_dtype)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        onnx.save(build_decoder(manifest.decoder, weights, attention, PortableLinear()), target / GRAPH_NAME)
        os.link(engine / WEIGHTS_NAME, target / WEIGHTS_NAME)
        known = {name: digest for name, digest in manifest.sha256.items() if name == WEIGHTS_NAME}
        dataclasses.replace(manifest, draft_heads=None).with_files(target, known).save(target)

    build_once(target, build)
    return target


def _stored_weights(graph: onnx.GraphProto) -> Mapping[str, StoredWeight]:
    """The weights of an engine's graph, as they lie in its file."""
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
    found: dict[str, StoredWeight] = {}
    used = set()
    for node in graph.node:
        if node.op_type != "Linear":
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        packed, scales, zeros = (*node.input[1:4], "", "")[:3]
        used |= {packed, scales, zeros}
        found[packed.removesuffix(".packed")] = PackedWeight(
            tensors[packed],
            (attributes["out_features"], attributes["in_features"]),
            attributes["bits"],
            attributes["group_size"],
            tensors[scales] if scales else None,
            tensors[zeros] if zeros else None,
        )
    return found | {name: PlainWeight(tensor) for name, tensor in tensors.items() if name not in used}
