"""The engine directory: what it holds, and `manifest.json`, which describes it.

    engine/
      manifest.json         this schema; written last, so a directory without it is no engine
      model.onnx            decoder graph with ForkAttention and Linear nodes (domain `apar`)
      model_portable.onnx   the same decoder in standard operators only (tree-mask Attention)
      heads.onnx, heads_portable.onnx   Medusa heads, where the checkpoint has some
      model.onnx.data       external data that all graphs share
      tokenizer.json, tokenizer_config.json, ...

The schema is versioned by `format_version`; the contract of the ForkAttention node by `abi_version`,
that of the Linear node, which is also the layout of matrices, by `linear_abi_version`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apar.export import manifest_rules
from apar.export.errors import EngineError

FORMAT_VERSION = 2
ABI_VERSION = 1
LINEAR_ABI_VERSION = 1
MANIFEST_NAME = "manifest.json"
GRAPH_NAME = "model.onnx"
PORTABLE_GRAPH_NAME = "model_portable.onnx"
HEADS_GRAPH_NAME = "heads.onnx"
PORTABLE_HEADS_GRAPH_NAME = "heads_portable.onnx"
WEIGHTS_NAME = "model.onnx.data"

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a Llama-family decoder, as the graph and every executor need it."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_context: int
    rope_inv_freq: tuple[float, ...]
    """Inverse frequencies after any RoPE scaling, `head_dim // 2` of them; angle = position * inv_freq."""
    rope_scale: float = 1.0
    """Factor on cos and sin (YaRN's attention factor; 1 elsewhere)."""
    attention_bias: bool = False
    """q, k, v and o projections have biases."""
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def qkv_size(self) -> int:
        """Width of the packed q, k, v projection: (num_heads + 2 * num_kv_heads) * head_dim."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes that one token's keys and values take over all layers."""
        width = 4 if kv_dtype == "float32" else 2
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * width


@dataclass(frozen=True, slots=True)
class DraftHeads:
    """Medusa heads: head i predicts the token at offset 2 + i from the hidden state after the last norm."""

    count: int
    blocks: int
    """Residual blocks (x + SiLU(Linear(x))) of a head."""
    tied_lm_head: bool = False
    """The heads end in the model's own lm_head instead of one of their own."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids that decoding itself must know (APAR's [Fork] is `[SplitMask]`, [Child] is `[SplitSop]`)."""

    fork: int
    child: int
    eos: tuple[int, ...]
    bos: int | None = None
    """Stands in front of every prompt that no chat template writes; None: the tokenizer puts nothing there."""
    pad: int | None = None


@dataclass(frozen=True, slots=True)
class TensorRtEngine:
    """What a compiled TensorRT engine was made for, and what a step may hold."""

    version: str
    """TensorRT that compiled it, such as 10.14.1.48; an engine runs with no other."""
    compute_capability: str
    """Of the GPU that it was compiled on, such as 9.0; it runs on no other kind."""
    device: str
    """That GPU's name, for people."""
    max_rows: int
    """Branches in one step."""
    max_tokens: int
    """Tokens in one step."""
    max_blocks: int
    """Blocks that the KV pool may have."""
    table_width: int
    """Blocks of the longest path."""
    max_copies: int
    """Slot copies in one step."""
    kv_fraction: float
    """Part of the GPU's memory, free after the weights, that pools take by default."""
    kv_binding: str = "in-place"
    """How the plugin gets at the pools (typed_graph.KV_BINDINGS)."""
    engine_id: int = 0
    """Finds the pools of this engine where they are bound."""
    tp_size: int = 1
    """Ranks that compute the model together, each with an engine file `rank{r}.engine`."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of `manifest.json`."""

    decoder: DecoderConfig
    tokens: TokenIds
    block_size: int
    dtype: str = "float32"
    """Type in which unquantised weights are stored; sums on the CPU are float32."""
    kv_dtype: str = "float32"
    """Element type of the KV pools of `model.onnx` (the portable graph always uses float32)."""
    quantize: str = "none"
    group_size: int = 0
    """Input channels that share a scale in quantised matrices; 0: all of an output channel, or nothing is quantised."""
    zero_points: bool = False
    """Groups of quantised matrices have zero points of their own."""
    quantize_method: str = "none"
    """How codes were chosen: "rtn" or "gptq"; "none" where nothing is quantised."""
    draft_heads: DraftHeads | None = None
    """Medusa heads in `heads.onnx`; None: the engine has none."""
    source: str = ""
    """Name of the checkpoint directory, for people."""
    apar_version: str = ""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every other file of the engine: a truncated copy is found at load."""
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the same files, in hexadecimal: `verify` finds a copy whose bytes changed."""
    tensorrt: TensorRtEngine | None = None
    """Of a TensorRT engine; it has no graph that another executor could run."""
    format_version: int = FORMAT_VERSION
    abi_version: int = ABI_VERSION
    linear_abi_version: int = LINEAR_ABI_VERSION

    def save(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`, atomically."""
        target = directory / MANIFEST_NAME
        partial = target.with_suffix(".json.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check an engine directory's manifest.

        Raises EngineError if the directory is no engine, is of another version, or lacks files.
        """
        path = directory / MANIFEST_NAME
        if not directory.is_dir():
            raise EngineError(
                f"{directory} is not a directory; give an engine built with `apar build CHECKPOINT -o DIR`"
            )
        if not path.is_file():
            raise EngineError(
                f"{directory} holds no {MANIFEST_NAME}, so it is no engine or its build did not finish; "
                "build it with `apar build CHECKPOINT -o DIR`"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise EngineError(f"{path} cannot be read as JSON ({error}); build the engine again") from error
        manifest = cls._from_json(data, path)
        manifest._check_files(directory)
        return manifest

    def with_files(self, directory: Path, known: Mapping[str, str] | None = None) -> Manifest:
        """This manifest with the sizes and checksums of all other files in `directory`.

        known: checksums of files that need not be read again.
        """
        paths = [path for path in sorted(directory.iterdir()) if path.name != MANIFEST_NAME]
        digests = {path.name: (known or {}).get(path.name) or file_sha256(path) for path in paths}
        return dataclasses.replace(self, files={path.name: path.stat().st_size for path in paths}, sha256=digests)

    def verify(self, directory: Path, progress: Callable[[int], None] | None = None) -> None:
        """Read every file of the engine and compare its checksum; `load` compares sizes only, which takes no time.

        progress: called with the bytes read after each piece. Raises EngineError for the first file that differs, and
        where the manifest has no checksums.
        """
        missing = sorted({*self.files} - {*self.sha256})
        if missing or not self.files:
            raise EngineError(
                f"{directory / MANIFEST_NAME} has no checksum of {', '.join(missing) or 'any file'}; "
                "build the engine again with the installed `apar build`"
            )
        self._check_files(directory)
        for name, digest in self.sha256.items():
            if file_sha256(directory / name, progress) != digest:
                raise EngineError(
                    f"engine file {directory / name} is damaged: its bytes are not those that were built; "
                    "copy it again or build the engine again"
                )

    @classmethod
    def _from_json(cls, data: Any, path: Path) -> Manifest:
        if not isinstance(data, dict) or "format_version" not in data:
            raise EngineError(f"{path} has no format_version, so it is not an engine manifest; build the engine again")
        for key, ours in (
            ("format_version", FORMAT_VERSION),
            ("abi_version", ABI_VERSION),
            ("linear_abi_version", LINEAR_ABI_VERSION),
        ):
            if data.get(key) != ours:
                raise EngineError(
                    f"{path} has {key} {data.get(key)}, this version of APAR reads {ours}; "
                    "build the engine again with the installed `apar build`"
                )
        try:
            decoder = dict(data["decoder"])
            decoder["rope_inv_freq"] = tuple(float(f) for f in decoder["rope_inv_freq"])
            tokens = dict(data["tokens"])
            tokens["eos"] = tuple(int(i) for i in tokens["eos"])
            heads = data.get("draft_heads")
            tensorrt = data.get("tensorrt")
            rest = {k: v for k, v in data.items() if k not in ("decoder", "tokens", "draft_heads", "tensorrt")}
            manifest = cls(
                decoder=DecoderConfig(**decoder),
                tokens=TokenIds(**tokens),
                draft_heads=None if heads is None else DraftHeads(**heads),
                tensorrt=None if tensorrt is None else TensorRtEngine(**tensorrt),
                **rest,
            )
            manifest_rules.check(manifest)
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{path} does not follow the manifest schema ({error}); build the engine again"
            ) from error

    def _check_files(self, directory: Path) -> None:
        for name, size in self.files.items():
            path = directory / name
            if not path.is_file():
                raise EngineError(f"engine file {path} is missing; copy the whole directory or build the engine again")
            if path.stat().st_size != size:
                raise EngineError(
                    f"engine file {path} has {path.stat().st_size} bytes, the manifest says {size}; "
                    "copy the engine again or build it again"
                )


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `progress` is told the bytes of each piece read. Raises EngineError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                if progress is not None:
                    progress(len(piece))
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
