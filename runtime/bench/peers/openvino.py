"""OpenVINO's CPU plugin on a Llama graph of the same shape, random weights, one batch of rows.

Weights of int4 and int8 are compressed as OpenVINO stores them (integers, zero point, scales of groups of 32), keys
and values are states of the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

from apar.runtime.bench.peers.protocol import Task

GROUP = 32
_BLOCK = 1 << 20


class OpenVino:
    """A compiled model with an infer request."""

    def __init__(self, task: Task) -> None:
        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": task.threads, "NUM_STREAMS": 1})
        precision = "bf16" if task.weights == "bf16" else "f32"
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": "f16"}
        self._request = core.compile_model(_Graph(task).model(), "CPU", settings).create_infer_request()
        self._task = task
        self._rng = np.random.default_rng(task.seed)
        self._rows = self._length = 0
        self.detail = f"OpenVINO {openvino.__version__.split('-')[0]}, {task.weights}, {task.threads} threads"

    def begin(self, rows: int) -> None:
        """See Peer.begin."""
        self._request.reset_state()
        self._rows, self._length = rows, 0
        self._run(self._task.context)

    def step(self) -> None:
        """See Peer.step."""
        self._run(1)

    def _run(self, count: int) -> None:
        end = self._length + count
        mask = np.where(np.arange(end) <= np.arange(self._length, end)[:, None], 0, -np.inf).astype(np.float32)
        self._request.infer(
            {
                "input_ids": self._rng.integers(3, self._task.config["vocab_size"], (self._rows, count)),
                "positions": np.arange(self._length, end, dtype=np.float32)[None],
                "mask": mask[None, None],
                "beams": np.arange(self._rows, dtype=np.int32),
            }
        )
        self._length = end


class _Graph:
    """The decoder in OpenVINO's operators."""

    def __init__(self, task: Task) -> None:
        self._config, self._weights = task.config, task.weights
        self._rng = np.random.default_rng(task.seed)
        self._normal = self._rng.standard_normal(_BLOCK, np.float32) * np.float32(0.02)
        self._states: list[Any] = []
        self._dim = self._config["hidden_size"] // self._config["num_attention_heads"]

    def model(self) -> openvino.Model:
        """The whole step: input_ids [B, T] -> logits of the last token [B, 1, vocab]."""
        config, dim = self._config, self._dim
        hidden_size, vocab = config["hidden_size"], config["vocab_size"]
        ids = op.parameter([-1, -1], np.int64, name="input_ids")
        positions = op.parameter([1, -1], np.float32, name="positions")
        mask = op.parameter([1, 1, -1, -1], np.float32, name="mask")
        self._beams = op.parameter([-1], np.int32, name="beams")
        self._batch = op.gather(op.shape_of(ids, "i64"), _ints([0]), _ints([0]))
        embedding = op.constant(np.resize(self._normal, (vocab, hidden_size)).astype(np.float16))
        hidden = op.gather(op.convert(embedding, "f32"), ids, _ints(0))
        inverse = config["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
        angles = op.matmul(op.unsqueeze(positions, _ints(2)), op.constant(inverse[None, None]), False, False)
        angles = op.unsqueeze(op.concat([angles, angles], 2), _ints(1))
        cos, sin = op.cos(angles), op.sin(angles)
        for layer in range(config["num_hidden_layers"]):
            hidden = self._layer(layer, hidden, cos, sin, mask)
        last = op.gather(self._norm(hidden), _ints([-1]), _ints(1))
        logits = self._linear(last, hidden_size, vocab, "int8" if self._weights == "int4" else self._weights)
        inputs = [ids, positions, mask, self._beams]
        return openvino.Model([op.result(logits)], self._states, inputs, "llama")

    def _layer(self, layer: int, hidden: Any, cos: Any, sin: Any, mask: Any) -> Any:
        config, dim = self._config, self._dim
        size, ffn = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        normed = self._norm(hidden)
        q, k, v = (
            op.transpose(
                op.reshape(self._linear(normed, size, count * dim), _ints([0, 0, count, dim]), True),
                _ints([0, 2, 1, 3]),
            )
            for count in (heads, kv_heads, kv_heads)
        )
        q, k = (op.add(op.multiply(x, cos), op.multiply(self._half_turned(x), sin)) for x in (q, k))
        k, v = self._state(f"{layer}.k", k, kv_heads), self._state(f"{layer}.v", v, kv_heads)
        if heads != kv_heads:
            k, v = self._repeated(k, heads, kv_heads), self._repeated(v, heads, kv_heads)
        attended = op.scaled_dot_product_attention(q, k, v, mask)
        attended = op.reshape(op.transpose(attended, _ints([0, 2, 1, 3])), _ints([0, 0, size]), True)
        hidden = op.add(hidden, self._linear(attended, size, size))
        normed = self._norm(hidden)
        gated = op.multiply(op.swish(self._linear(normed, size, ffn)), self._linear(normed, size, ffn))
        return op.add(hidden, self._linear(gated, ffn, size))

    def _state(self, name: str, value: Any, heads: int) -> Any:
        """`value` [B, heads, T, dim] appended to what earlier steps left."""
        info = VariableInfo()
        info.data_shape = openvino.PartialShape([-1, heads, -1, self._dim])
        info.data_type, info.variable_id = openvino.Type.f32, name
        variable = Variable(info)
        empty = op.concat([self._batch, _ints([heads]), _ints([0]), _ints([self._dim])], 0)
        past = op.read_value(op.broadcast(op.constant(np.float32(0)), empty), variable)
        both = op.concat([op.gather(past, self._beams, _ints(0)), value], 2)
        self._states.append(op.assign(both, variable))
        return both

    def _repeated(self, value: Any, heads: int, kv_heads: int) -> Any:
        """[B, kv_heads, S, dim] with each head as often as query heads share it."""
        wide = op.unsqueeze(value, _ints(2))
        times = heads // kv_heads
        wide = op.broadcast(wide, _ints([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, _ints([0, heads, -1, self._dim]), True)

    def _half_turned(self, value: Any) -> Any:
        low, high = op.split(value, _ints(3), 2).outputs()
        return op.concat([op.multiply(high, op.constant(np.float32(-1))), low], 3)

    def _norm(self, value: Any) -> Any:
        square = op.power(value, op.constant(np.float32(2)))
        mean = op.reduce_mean(square, _ints([-1]), True)
        root = op.sqrt(op.add(mean, op.constant(np.float32(self._config["rms_norm_eps"]))))
        normed = op.multiply(value, op.divide(op.constant(np.float32(1)), root))
        size = self._config["hidden_size"]
        return op.multiply(normed, op.constant(np.ones((1, 1, size), np.float32)))

    def _linear(self, value: Any, columns: int, rows: int, weights: str | None = None) -> Any:
        return op.matmul(value, self._matrix(rows, columns, weights or self._weights), False, True)

    def _matrix(self, rows: int, columns: int, weights: str) -> Any:
        if weights == "f32":
            return op.constant(np.resize(self._normal, (rows, columns)))
        if weights == "bf16":
            tensor = openvino.Tensor(openvino.Type.bf16, openvino.Shape([rows, columns]))
            bits = (np.resize(self._normal, (rows, columns)).view(np.uint32) >> 16).astype(np.uint16)
            np.copyto(tensor.data.view(np.uint16), bits)
            return op.convert(op.constant(tensor, shared_memory=False), "f32")
        groups, bits4 = columns // GROUP, weights == "int4"
        kind = openvino.Type.u4 if bits4 else openvino.Type.u8
        raw = self._rng.integers(0, 256, rows * columns // (2 if bits4 else 1), np.uint8)
        codes = openvino.Tensor(kind, openvino.Shape([rows, groups, GROUP]))
        np.copyto(codes.data.reshape(-1), raw)
        zero = openvino.Tensor(kind, openvino.Shape([1, 1, 1]))
        zero.data.reshape(-1)[:] = 8 if bits4 else 128
        scale = np.full((rows, groups, 1), 0.02 / (4 if bits4 else 64), np.float16)
        numbers = op.convert(op.constant(codes, shared_memory=False), "f16")
        numbers = op.subtract(numbers, op.convert(op.constant(zero, shared_memory=False), "f16"))
        numbers = op.multiply(numbers, op.constant(scale))
        return op.convert(op.reshape(numbers, _ints([rows, columns]), False), "f32")


def _ints(values: Any) -> Any:
    return op.constant(np.array(values, np.int64))


load = OpenVino
