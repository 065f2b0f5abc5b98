"""Checkpoints and engines of known shapes with random weights: speed depends on shapes, not on what was learned.

A checkpoint of random weights need not be as large as a real one: its tensors may all lie in one block of random
numbers, overlapping, since a checkpoint's header says where each begins. So 7B takes 0.3 GB, and an engine is built
from it by the same code as from any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from apar import export
from apar.export import onnx_engine
from apar.export.checkpoint import expected_tensors
from apar.export.errors import EngineError
from apar.export.llama_config import read_config
from apar.export.manifest import MANIFEST_NAME
from apar.runtime.engine_source import Progress, build_once, cache_directory, resolve_engine

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "vocab_size": 32002,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32),
    "1b": (2048, 5632, 22, 32, 4),
    "100m": (768, 2048, 12, 12, 12),
    "10m": (256, 704, 4, 4, 4),
}
"""hidden, intermediate, layers, heads, kv heads: those of APAR-7B, TinyLlama, and two small ones."""
FORMATS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
"""Build options of each weight format; codes are rounded to nearest, which costs no time at run time."""
STANDARD_DEVIATION = 0.02


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """`config.json` of a shape, with another number of layers where given."""
    hidden, ffn, default_layers, heads, kv_heads = SHAPES[shape]
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers or default_layers,
    }


def shape_engine(
    source: str, weights: str = "int4", *, layers: int | None = None, seed: int = 0, progress: Progress | None = None
) -> Path:
    """The engine directory of a named shape with random weights in the format `weights`, or of an engine given by path.

    Engines are kept in the cache directory and built again when the code that builds them changes.
    Raises EngineError where `source` is neither, BuildError where the disk is full.
    """
    if source not in SHAPES or Path(source, MANIFEST_NAME).is_file():
        try:
            return resolve_engine(source, progress)
        except EngineError as error:
            raise EngineError(f"{error}; shapes with random weights are {', '.join(SHAPES)}") from error
    if weights not in FORMATS:
        raise EngineError(f"there is no weight format {weights!r}; formats are {', '.join(FORMATS)}")
    name = f"{source}-{layers}-layers-{weights}" if layers else f"{source}-{weights}"
    home = cache_directory() / "shapes"
    target = home / f"{name}-seed{seed}-{_recipe()}"

    def build() -> None:
        for stale in home.glob(f"{name}-seed{seed}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        room = home / f".{target.name}"
        try:
            write_overlapping_checkpoint(room / name, shape_config(source, layers), seed)
            onnx_engine.build(room / name, target, overwrite=True, progress=progress, **FORMATS[weights])
        finally:
            shutil.rmtree(room, ignore_errors=True)

    build_once(target, build)
    return target


def write_overlapping_checkpoint(directory: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """Write a checkpoint in bfloat16 whose matrices are pieces of one block of normal numbers; norms are ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    write_byte_tokenizer(directory)
    tensors = dict(expected_tensors(read_config(directory).decoder))
    rng = np.random.default_rng(seed)
    ones = max(math.prod(shape) for shape in tensors.values() if len(shape) == 1)
    largest = max(map(math.prod, tensors.values()))
    spread = largest // 4
    block = np.empty(ones + largest + spread, ml_dtypes.bfloat16)
    block[:ones] = 1
    normal = rng.standard_normal(1 << 20, dtype=np.float32) * np.float32(STANDARD_DEVIATION)
    for start in range(ones, block.size, normal.size):
        part = block[start : start + normal.size]
        part[:] = rng.permutation(normal)[: part.size]
    header = {}
    for name, shape in tensors.items():
        begin = 0 if len(shape) == 1 else 2 * (ones + int(rng.integers(spread + 1)))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin + 2 * math.prod(shape)]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.write(block.view(np.uint8).data)


def write_byte_tokenizer(directory: Path) -> None:
    """Write the smallest tokenizer that can encode any text: one token a byte, and APAR's control tokens."""
    specials, controls = ["<unk>", "<s>", "</s>"], ["[SplitMask]", "[SplitSop]"]
    vocab = {text: i for i, text in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256))])}
    added = [(text, vocab[text], True) for text in specials]
    added += [(text, len(vocab) + i, False) for i, text in enumerate(controls)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": special} | flags for text, i, special in added],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _recipe() -> str:
    """Changes whenever the code that builds engines does."""
    digest = hashlib.blake2b(digest_size=6)
    folder = Path(export.__file__).parent
    for path in sorted([*folder.glob("*.py"), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
