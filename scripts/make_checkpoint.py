#!/usr/bin/env python3
"""Write a checkpoint of random weights in the Hugging Face layout, for timings and memory tests.

    python scripts/make_checkpoint.py /path/to/out --shape 7b

Shards stream to disk: memory stays small whatever the shape. The weights repeat one block of normal numbers
from random places, so a 13 GB checkpoint takes no longer than writing 13 GB. It talks nonsense.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from apar.export.checkpoint import expected_tensors
from apar.export.llama_config import read_config
from apar.runtime.bench.shapes import SHAPES, STANDARD_DEVIATION, shape_config, write_byte_tokenizer

DTYPES = {"float16": (np.float16, "F16"), "bfloat16": (ml_dtypes.bfloat16, "BF16"), "float32": (np.float32, "F32")}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
CHUNK = 1 << 22


def write_tokenizer(directory: Path, source: Path | None) -> None:
    """Copy the tokenizer of `source`, or write the byte tokenizer."""
    if source is not None:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy(source / name, directory / name)
        return
    write_byte_tokenizer(directory)


def shards(tensors: dict[str, tuple[int, ...]], width: int, limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Cut the list of tensors into shards of at most `limit` bytes (or one tensor)."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        length = math.prod(shape) * width
        if shard and size + length > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += length
    yield shard


def write_shard(
    path: Path, shard: dict[str, tuple[int, ...]], dtype: str, normal: np.ndarray, rng: np.random.Generator
) -> None:
    """Write one safetensors file: norms are ones, everything else comes from `normal`."""
    element, code = DTYPES[dtype]
    header, offset = {}, 0
    for name, shape in shard.items():
        end = offset + math.prod(shape) * np.dtype(element).itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shard.items():
            left = math.prod(shape)
            while left:
                count = min(left, CHUNK)
                start = int(rng.integers(0, len(normal) - count + 1))
                values = np.ones(count, element) if name.endswith("norm.weight") else normal[start : start + count]
                file.write(values.view(np.uint8).data)
                left -= count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to make; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--layers", type=int, help="other number of layers than the shape's")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--tokenizer", type=Path, help="directory whose tokenizer to copy (default: one token a byte)")
    parser.add_argument("--max-shard-size", type=int, default=4 << 30, metavar="BYTES")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = shape_config(arguments.shape, arguments.layers) | {"torch_dtype": arguments.dtype}
    output: Path = arguments.output
    try:
        output.mkdir(parents=True)
    except OSError as error:
        parser.error(f"{output} cannot be made: {error.strerror}; name a directory that does not exist yet")
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(output, arguments.tokenizer)
    element = np.dtype(DTYPES[arguments.dtype][0])
    rng = np.random.default_rng(arguments.seed)
    normal = (rng.standard_normal(2 * CHUNK + 1, dtype=np.float32) * np.float32(STANDARD_DEVIATION)).astype(element)
    tensors = dict(expected_tensors(read_config(output).decoder))
    parts = list(shards(tensors, element.itemsize, arguments.max_shard_size))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        write_shard(output / name, shard, arguments.dtype, normal, rng)
        weight_map |= dict.fromkeys(shard, name)
        print(f"{output / name}: {(output / name).stat().st_size / 1e9:.2f} GB", flush=True)
    if len(parts) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


if __name__ == "__main__":
    main()
