"""llama.cpp through llama-cpp-python; its model is written with the `gguf` package, random weights of the same shape.

int4 is Q4_0 (4.5 bits a weight) with the last matrix in Q8_0, int8 is Q8_0 (8.5 bits); keys and values are float16.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from apar.runtime.bench.peers.protocol import Task

TYPES = {"f32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class LlamaCpp:
    """A context with a sequence for each row."""

    def __init__(self, task: Task) -> None:
        self._task = task
        path = Path(task.folder) / f"{task.weights}-{task.seed}.gguf"
        if not path.is_file():
            partial = path.with_suffix(f".{os.getpid()}")
            _write(partial, task)
            partial.replace(path)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        length = task.context + task.most_steps + 2
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length * task.most_rows
        params.n_batch = params.n_ubatch = max(task.context, task.most_rows)
        params.n_seq_max = task.most_rows
        params.n_threads = params.n_threads_batch = task.threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._rng = np.random.default_rng(task.seed)
        self._rows = self._length = 0
        self.detail = f"llama-cpp-python {llama_cpp.__version__}, {TYPES[task.weights]}, {task.threads} threads"

    def begin(self, rows: int) -> None:
        """See Peer.begin."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._rows, self._length = rows, 0
        for row in range(rows):
            self._decode([(row, position) for position in range(self._task.context)], last_only=True)
        self._length = self._task.context

    def step(self) -> None:
        """See Peer.step."""
        self._decode([(row, self._length) for row in range(self._rows)], last_only=False)
        self._length += 1
        logits = llama_cpp.llama_get_logits(self._context)
        if not ctypes.cast(logits, ctypes.c_void_p).value:
            raise RuntimeError("llama.cpp gave no logits")

    def _decode(self, tokens: list[tuple[int, int]], *, last_only: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        ids = self._rng.integers(3, self._task.config["vocab_size"], len(tokens)).tolist()
        for i, (row, position) in enumerate(tokens):
            batch.token[i], batch.pos[i] = ids[i], position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = not last_only or i == len(tokens) - 1
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")


def _write(path: Path, task: Task) -> None:
    """A GGUF file whose matrices are pieces of one random block."""
    config, kind = task.config, gguf.GGMLQuantizationType
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = hidden // heads
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(task.seed)
    normal = rng.standard_normal((1 << 20) // 32 * 32, np.float32) * np.float32(0.02)
    blocks: dict[str, Any] = {}

    def matrix(name: str, rows: int, columns: int, type_name: str) -> None:
        if type_name not in blocks:
            data = gguf.quants.quantize(normal.reshape(-1, 32), kind[type_name]).view(np.uint8).reshape(-1)
            blocks[type_name] = (data, data.size // (normal.size // 32))
        data, per_block = blocks[type_name]
        width = columns // 32 * per_block
        raw = np.resize(data, (rows, width))
        if type_name in ("F32", "F16"):
            raw = raw.view(np.float32 if type_name == "F32" else np.float16)
            writer.add_tensor(name, raw)
        else:
            writer.add_tensor(name, raw, raw_dtype=kind[type_name])

    projection = TYPES[task.weights]
    matrix("token_embd.weight", vocab, hidden, "F32" if task.weights == "f32" else "F16")
    for i in range(config["num_hidden_layers"]):
        layer = f"blk.{i}"
        writer.add_tensor(f"{layer}.attn_norm.weight", np.ones(hidden, np.float32))
        for name, rows in (("q", hidden), ("k", kv_heads * dim), ("v", kv_heads * dim), ("output", hidden)):
            matrix(f"{layer}.attn_{name}.weight", rows, hidden, projection)
        writer.add_tensor(f"{layer}.ffn_norm.weight", np.ones(hidden, np.float32))
        matrix(f"{layer}.ffn_gate.weight", ffn, hidden, projection)
        matrix(f"{layer}.ffn_up.weight", ffn, hidden, projection)
        matrix(f"{layer}.ffn_down.weight", hidden, ffn, projection)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    matrix("output.weight", vocab, hidden, "Q8_0" if task.weights == "int4" else projection)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


load = LlamaCpp
