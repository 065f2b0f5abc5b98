"""The same decoder as a network of TensorRT-LLM's own API, for a host that builds engines with it (1.0 to 1.2.1).

Written, not run: no machine with TensorRT-LLM was at hand. It has the graph's inputs, outputs and profiles
(typed_graph.py, tensorrt_profiles.py), so an engine that it makes runs with the `tensorrt` executor, and needs the same
plugin library. `apar build --format tensorrt` needs no TensorRT-LLM and is the way that tests go.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.export.checkpoint import Checkpoint
from apar.export.errors import BuildError
from apar.export.manifest import ABI_VERSION, DecoderConfig, TensorRtEngine
from apar.export.tensor_files import to_float32
from apar.export.tensorrt_api import load_plugins, load_tensorrt
from apar.export.tensorrt_profiles import DECODE, MIXED, ranges
from apar.export.typed_graph import KV_BINDINGS, PLUGIN_NAMESPACE, PLUGIN_VERSION

VERSIONS = ((1, 0), (1, 3))
"""TensorRT-LLM from the first up to, not including, the second has the engine backend as used here."""
_STEP: dict[str, tuple[int | str, ...]] = {
    "position_ids": ("T",),
    "query_start": ("R_plus_1",),
    "kv_len": ("R",),
    "block_table": ("R", "MB"),
    "slot_mapping": ("T",),
    "slot_copies": ("C", 2),
    "prefix_rows": ("G_plus_1",),
    "prefix_blocks": ("G",),
    "tree_mask": ("M", "W"),
}
_PLAN = ("query_start", "kv_len", "slot_mapping", "prefix_rows", "prefix_blocks", "tree_mask")


def load_tensorrt_llm() -> ModuleType:
    """Import TensorRT-LLM. Raises BuildError where it is missing or of a version without the engine backend."""
    try:
        version = metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        raise BuildError(
            "TensorRT-LLM is not installed; use a container of NVIDIA with TensorRT-LLM 1.0 to 1.2.1, or build without "
            "it: apar build CHECKPOINT -o DIR --format tensorrt"
        ) from None
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise BuildError(f"TensorRT-LLM {version} is installed; its engine backend, used here, is in 1.0 to 1.2.1 only")
    import tensorrt_llm

    module: ModuleType = tensorrt_llm
    return module


def build_with_tensorrt_llm(checkpoint: Checkpoint, facts: TensorRtEngine, *, dtype: str, block_size: int) -> Any:
    """The serialised engine (trt.IHostMemory) of `checkpoint` for one GPU. `facts` are the sizes of a step.

    Raises BuildError and PluginError for what is missing or does not fit.
    """
    tensorrt_llm = load_tensorrt_llm()
    trt = load_tensorrt()
    load_plugins(trt)
    builder = tensorrt_llm.Builder()
    config = builder.create_builder_config(precision=dtype, strongly_typed=True)
    config.trt_builder_config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    network = builder.create_network()
    network.plugin_config.to_legacy_setting()
    with tensorrt_llm.net_guard(network):
        decoder = _module(checkpoint, facts, dtype, block_size)
        network.set_named_parameters(decoder.named_parameters())
        inputs = decoder.prepare_inputs()
        logits, pools = decoder(**inputs)
        logits.mark_output("logits", trt.DataType.FLOAT)
        for layer, pool in enumerate(pools):
            pool.mark_output(f"present_kv_{layer}", _kind(trt, dtype))
    engine = builder.build_engine(network, config)
    if engine is None:
        raise BuildError("TensorRT-LLM's builder made no engine; its log says why")
    return engine


def _kind(trt: Any, dtype: str) -> Any:
    return {"float16": trt.DataType.HALF, "bfloat16": trt.DataType.BF16}[dtype]


def _module(checkpoint: Checkpoint, facts: TensorRtEngine, dtype: str, block_size: int) -> Any:
    """The decoder as a tensorrt_llm Module; classes are made here, since their bases are TensorRT-LLM's."""
    import tensorrt as trt
    import torch
    from tensorrt_llm import Module
    from tensorrt_llm._common import default_trtnet
    from tensorrt_llm.functional import Tensor, _create_tensor, cast, constant, index_select, silu
    from tensorrt_llm.layers import ColumnLinear, Embedding, RmsNorm
    from tensorrt_llm.module import ModuleList

    config = checkpoint.decoder
    bound = facts.kv_binding == "bound"
    symbols = [ranges(facts, profile) for profile in (DECODE, MIXED)]

    def values(*names: str, kind: str = dtype) -> Any:
        arrays = [to_float32(checkpoint.tensors[name].read()) for name in names]
        return torch.from_numpy(np.concatenate(arrays)).to(getattr(torch, kind))

    def network_input(name: str, kind: Any, shape: tuple[int | str, ...]) -> Any:
        dims = OrderedDict(
            (size, [list(profile[size]) for profile in symbols])
            if isinstance(size, str)
            else (f"{name}_{axis}", [size] * len(symbols))
            for axis, size in enumerate(shape)
        )
        sizes = [-1 if isinstance(size, str) else size for size in shape]
        return Tensor(name=name, dtype=kind, shape=sizes, dim_range=dims)

    def plugin(name: str, fields: Any, inputs: list[Any]) -> Any:
        creator = trt.get_plugin_registry().get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
        made = creator.create_plugin(name, fields.collection(trt), trt.TensorRTPhase.BUILD)
        return default_trtnet().add_plugin_v3([tensor.trt_tensor for tensor in inputs], [], made)

    class Layer(Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            name, hidden = f"model.layers.{index}", config.hidden_size
            self.index = index
            self.input_norm = RmsNorm(normalized_shape=hidden, eps=config.rms_norm_eps, dtype="float32")
            self.input_norm.weight.value = values(f"{name}.input_layernorm.weight", kind="float32")
            self.post_norm = RmsNorm(normalized_shape=hidden, eps=config.rms_norm_eps, dtype="float32")
            self.post_norm.weight.value = values(f"{name}.post_attention_layernorm.weight", kind="float32")
            heads = config.num_heads * config.head_dim
            self.qkv = self._linear(hidden, config.qkv_size, f"{name}.self_attn", "qkv", config.attention_bias)
            self.o = self._linear(heads, hidden, f"{name}.self_attn", "o", config.attention_bias)
            mlp, ffn = f"{name}.mlp", config.intermediate_size
            self.gate = self._linear(hidden, ffn, mlp, ("gate",), config.mlp_bias)
            self.up = self._linear(hidden, ffn, mlp, ("up",), config.mlp_bias)
            self.down = self._linear(ffn, hidden, mlp, ("down",), config.mlp_bias)

        @staticmethod
        def _linear(columns: int, rows: int, prefix: str, parts: str | tuple[str, ...], bias: bool) -> Any:
            linear = ColumnLinear(columns, rows, bias=bias, dtype=dtype, gather_output=False)
            linear.weight.value = values(*(f"{prefix}.{part}_proj.weight" for part in parts))
            if bias:
                linear.bias.value = values(*(f"{prefix}.{part}_proj.bias" for part in parts))
            return linear

        def forward(self, hidden: Any, pool: Any, step: list[Any], shared: list[Any]) -> tuple[Any, Any]:
            qkv = self.qkv(cast(self.input_norm(hidden), dtype))
            operands = [qkv, *([] if bound else [pool]), *step, *shared]
            layer = plugin("ForkAttention", attention_fields(config, facts, block_size, self.index), operands)
            attended = _create_tensor(layer.get_output(0), layer)
            present = None if bound else _create_tensor(layer.get_output(1), layer)
            hidden = hidden + cast(self.o(attended), "float32")
            normed = cast(self.post_norm(hidden), dtype)
            gated = silu(cast(self.gate(normed), "float32")) * cast(self.up(normed), "float32")
            return hidden + cast(self.down(cast(gated, dtype)), "float32"), present

    class ForkDecoder(Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
            self.embedding.weight.value = values("model.embed_tokens.weight")
            self.layers = ModuleList([Layer(index) for index in range(config.num_layers)])
            self.norm = RmsNorm(normalized_shape=config.hidden_size, eps=config.rms_norm_eps, dtype="float32")
            self.norm.weight.value = values("model.norm.weight", kind="float32")
            head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            self.lm_head = ColumnLinear(
                config.hidden_size, config.vocab_size, bias=False, dtype=dtype, gather_output=False
            )
            self.lm_head.weight.value = values(head)

        def prepare_inputs(self) -> dict[str, Any]:
            found = {"input_ids": network_input("input_ids", trt.DataType.INT32, ("T",))}
            found |= {name: network_input(name, trt.DataType.INT32, shape) for name, shape in _STEP.items()}
            found["logits_rows"] = network_input("logits_rows", trt.DataType.INT32, ("L",))
            pool = (2, "B", config.num_kv_heads, block_size, config.head_dim)
            for index in range(0 if bound else config.num_layers):
                found[f"past_kv_{index}"] = network_input(f"past_kv_{index}", _kind(trt, dtype), pool)
            return found

        def forward(self, input_ids: Any, logits_rows: Any, **inputs: Any) -> tuple[Any, list[Any]]:
            step = [inputs[name] for name in _STEP]
            planned = plugin("ForkPlan", plan_fields(config, block_size), [inputs[name] for name in _PLAN])
            frequencies = constant(np.array(config.rope_inv_freq, np.float32))
            shared = [_create_tensor(planned.get_output(0), planned), frequencies]
            hidden = cast(self.embedding(input_ids), "float32")
            pools = []
            for index, layer in enumerate(self.layers):
                hidden, present = layer(hidden, inputs.get(f"past_kv_{index}"), step, shared)
                pools += [] if present is None else [present]
            wanted = cast(self.norm(index_select(hidden, 0, logits_rows)), dtype)
            return cast(self.lm_head(wanted), "float32"), pools

    return ForkDecoder()


class _Fields:
    """Plugin fields and the arrays that they point into, which must live until the plugin is made."""

    def __init__(self, values: dict[str, int | float | tuple[float, ...]]) -> None:
        self.arrays: dict[str, npt.NDArray[Any]] = {
            name: np.atleast_1d(np.array(value, np.int32 if isinstance(value, int) else np.float32))
            for name, value in values.items()
        }

    def collection(self, trt: Any) -> Any:
        """As a creator takes them."""
        kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
        return trt.PluginFieldCollection(
            [trt.PluginField(name, array, kinds[array.dtype]) for name, array in self.arrays.items()]
        )


def plan_fields(config: DecoderConfig, block_size: int) -> _Fields:
    """Attributes of ForkPlan."""
    return _Fields(
        {
            "abi_version": ABI_VERSION,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "block_size": block_size,
        }
    )


def attention_fields(config: DecoderConfig, facts: TensorRtEngine, block_size: int, layer: int) -> _Fields:
    """Attributes of one layer's ForkAttention."""
    fields = plan_fields(config, block_size)
    more = _Fields(
        {
            "scale": config.head_dim**-0.5,
            "rope_scale": config.rope_scale,
            "rope_inv_freq": config.rope_inv_freq,
            "kv_binding": KV_BINDINGS.index(facts.kv_binding),
            "engine_id": facts.engine_id,
            "layer": layer,
        }
    )
    fields.arrays |= more.arrays
    return fields
