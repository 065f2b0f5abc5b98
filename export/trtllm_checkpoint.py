"""TensorRT-LLM's checkpoint format (1.0 to 1.2.1): `config.json` and a `rank{r}.safetensors` for each rank.

Read, it is a Checkpoint like any other: its tensors by Hugging Face's names, put together from all ranks. Written
(trtllm_writer.py), it is what `trtllm-build --checkpoint_dir` takes. Its names and how it splits them over ranks:

    transformer.vocab_embedding                   whole, or cut (`use_parallel_embedding`) by rows or by columns
    transformer.layers.{i}.attention.qkv          each rank: its heads' rows of q, then of k, then of v
    transformer.layers.{i}.attention.dense        o_proj, by columns
    transformer.layers.{i}.mlp.fc, .gate, .proj   gate_proj and up_proj by rows, down_proj by columns
    transformer.layers.{i}.input_layernorm, .post_layernorm; transformer.ln_f; lm_head, by rows
    medusa_heads.{h}.medusa_layers.{l}.linear, medusa_heads.{h}.lm_head, by rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apar.export.errors import CheckpointError
from apar.export.llama_config import LlamaConfig, config_from, read_json
from apar.export.manifest import DecoderConfig
from apar.export.tensor_files import StoredTensor, read_safetensors
from apar.export.tensor_pieces import Piece, pieced
from apar.export.trtllm_config import ARCHITECTURE, CONFIG_NAME, MEDUSA_ARCHITECTURE

_EXPECTED = {
    "hidden_act": ("silu", "swiglu"),
    "position_embedding_type": ("rope_gpt_neox",),
    "qk_layernorm": (False,),
    "residual_mlp": (False,),
    "rotary_pct": (1.0,),
    "sliding_window": (None, 0),
}
"""Fields that change the arithmetic, and the values that APAR's decoder has."""
_NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
_BY_ROWS = {"mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj"}
_BY_COLUMNS = {"attention.dense": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}


_MOST_RANKS = 4096


@dataclass(frozen=True, slots=True)
class TrtLlmCheckpoint:
    """What was found in the format's own words; no weight has been read."""

    config: LlamaConfig
    tensors: dict[str, StoredTensor]
    """By Hugging Face's names; Medusa heads by theirs (`medusa_heads.*`)."""


def is_trtllm(directory: Path) -> bool:
    """Whether a directory holds such a checkpoint."""
    if not (directory / "rank0.safetensors").is_file() or not (directory / CONFIG_NAME).is_file():
        return False
    return "architecture" in read_json(directory / CONFIG_NAME)


def read_trtllm(directory: Path) -> TrtLlmCheckpoint:
    """Read config and headers of all ranks.

    Raises CheckpointError for a model, quantisation or split that APAR does not have, by its name.
    """
    path = directory / CONFIG_NAME
    config = read_json(path)
    _check_supported(config, path)
    ranks = _count(_part(config, "mapping", path), "tp_size", path)
    files = [directory / f"rank{rank}.safetensors" for rank in range(ranks)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory} is cut over {ranks} ranks but lacks {', '.join(missing)}; copy it whole")
    parts = [read_safetensors(file) for file in files]
    llama = config_from(_as_hugging_face(config, parts[0]), path, {})
    return TrtLlmCheckpoint(llama, _Joiner(parts, llama.decoder, config, directory).tensors())


def _check_supported(config: Mapping[str, Any], path: Path) -> None:
    architecture = config.get("architecture")
    if architecture not in (ARCHITECTURE, MEDUSA_ARCHITECTURE, "LLaMAForCausalLM"):
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported; APAR reads {ARCHITECTURE}")
    quantization = _part(config, "quantization", path)
    for key in ("quant_algo", "kv_cache_quant_algo"):
        if quantization.get(key) not in (None, "", "None", "NO_QUANT"):
            raise CheckpointError(
                f"{path}: {key} {quantization[key]!r} is not supported; convert the float checkpoint without "
                "quantisation, and quantise in APAR's build (--quantize) where its format has that"
            )
    mapping = _part(config, "mapping", path)
    for key in ("pp_size", "cp_size", "moe_ep_size"):
        if _count(mapping, key, path) != 1:
            raise CheckpointError(f"{path}: {key} {mapping[key]} is not supported; convert the checkpoint with 1")
    experts = (config.get("moe") or {}).get("num_experts") if isinstance(config.get("moe"), Mapping) else 0
    if experts:
        raise CheckpointError(f"{path}: a mixture of {experts} experts is not supported")
    for key, allowed in _EXPECTED.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"{path}: {key} {config[key]!r} is not supported; APAR has {allowed[0]!r}")
    size = config.get("head_size")
    if size is not None and config.get("rotary_embedding_dim") not in (None, size):
        raise CheckpointError(f"{path}: rotary_embedding_dim {config['rotary_embedding_dim']} is not head_size {size}")


def _part(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    """An object of the config; none where it is absent or null."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: {key} must be an object, not {value!r}")
    return value


def _count(mapping: Mapping[str, Any], key: str, path: Path) -> int:
    """A number of ranks; 1 where it is absent, null or 0."""
    value = mapping.get(key) or 1
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_RANKS:
        raise CheckpointError(f"{path}: {key} must be a number of ranks, not {value!r}")
    return value


def _as_hugging_face(config: Mapping[str, Any], first: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The same model in Hugging Face's words. (There are no token ids: the tokenizer names them.)"""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.get("vocab_size"),
        "hidden_size": config.get("hidden_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_key_value_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_size"),
        "intermediate_size": config.get("intermediate_size"),
        "rms_norm_eps": config.get("norm_epsilon", 1e-6),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "rope_theta": config.get("rotary_base", 10000.0),
        "rope_scaling": config.get("rotary_scaling"),
        "attention_bias": bool(config.get("attn_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "tie_word_embeddings": "lm_head.weight" not in first,
    }


class _Joiner:
    """Finds each tensor's parts in the ranks' files."""

    def __init__(
        self,
        parts: Sequence[Mapping[str, StoredTensor]],
        decoder: DecoderConfig,
        config: Mapping[str, Any],
        where: Path,
    ) -> None:
        self._parts = parts
        self._decoder = decoder
        self._config = config
        self._where = where
        self._used: set[str] = set()

    def tensors(self) -> dict[str, StoredTensor]:
        """By Hugging Face's names. Raises CheckpointError where one is missing, of another size, or unknown."""
        found = dict(self._all())
        surplus = sorted(name for part in self._parts for name in part if name not in self._used)
        if surplus:
            raise CheckpointError(
                f"{self._where} holds tensors that APAR's decoder does not have: {', '.join(surplus[:5])}; scales and "
                "zero points come from a quantised conversion, which is not supported"
            )
        return found

    def _all(self) -> Iterator[tuple[str, StoredTensor]]:
        yield self._embedding()
        for i in range(self._decoder.num_layers):
            ours, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
            for name, target in _NORMS.items():
                yield self._same(f"{ours}.{name}.weight", f"{theirs}.{target}.weight")
            yield from self._qkv(f"{ours}.attention.qkv", f"{theirs}.self_attn")
            for name, target in _BY_ROWS.items():
                for leaf in self._leaves(self._decoder.mlp_bias):
                    yield self._rows(f"{ours}.{name}.{leaf}", f"{theirs}.{target}.{leaf}", None)
            for name, target in _BY_COLUMNS.items():
                yield self._columns(f"{ours}.{name}.weight", f"{theirs}.{target}.weight")
                bias = self._decoder.attention_bias if name.startswith("attention") else self._decoder.mlp_bias
                if bias:
                    yield self._same(f"{ours}.{name}.bias", f"{theirs}.{target}.bias")
        yield self._same("transformer.ln_f.weight", "model.norm.weight")
        if not self._decoder.tie_word_embeddings:
            yield self._rows("lm_head.weight", "lm_head.weight", self._decoder.vocab_size)
        for name in [name for name in self._parts[0] if name.startswith("medusa_heads.")]:
            yield self._rows(name, name, self._decoder.vocab_size if name.endswith("lm_head.weight") else None)

    @staticmethod
    def _leaves(bias: bool) -> tuple[str, ...]:
        return ("weight", "bias") if bias else ("weight",)

    def _take(self, name: str) -> list[StoredTensor]:
        self._used.add(name)
        for rank, part in enumerate(self._parts):
            if name not in part:
                raise CheckpointError(f"{self._where}: rank{rank}.safetensors lacks {name}; copy the checkpoint again")
        return [part[name] for part in self._parts]

    def _same(self, name: str, target: str) -> tuple[str, StoredTensor]:
        return target, self._renamed(self._take(name)[0], target)

    @staticmethod
    def _renamed(tensor: StoredTensor, target: str) -> StoredTensor:
        return pieced(target, tensor.shape, Piece(tensor, range(tensor.shape[0])))

    def _rows(self, name: str, target: str, rows: int | None) -> tuple[str, StoredTensor]:
        """Stacked; `rows` cuts off what a vocabulary was padded with."""
        parts, pieces, at = self._take(name), [], 0
        for part in parts:
            held = part.shape[0] if rows is None else max(0, min(part.shape[0], rows - at))
            pieces.append(Piece(part, range(held), row=at))
            at += held
        return target, pieced(target, (at, *parts[0].shape[1:]), *pieces)

    def _columns(self, name: str, target: str) -> tuple[str, StoredTensor]:
        parts, pieces, at = self._take(name), [], 0
        for part in parts:
            pieces.append(Piece(part, range(part.shape[0]), column=at))
            at += part.shape[1]
        return target, pieced(target, (parts[0].shape[0], at), *pieces)

    def _embedding(self) -> tuple[str, StoredTensor]:
        name, target = "transformer.vocab_embedding.weight", "model.embed_tokens.weight"
        if not self._config.get("use_parallel_embedding") or len(self._parts) == 1:
            return self._same(name, target)
        if int(self._config.get("embedding_sharding_dim") or 0) == 0:
            return self._rows(name, target, self._decoder.vocab_size)
        return self._columns(name, target)

    def _qkv(self, name: str, target: str) -> Iterator[tuple[str, StoredTensor]]:
        """Rows of each rank are q, k, v of its heads; ranks beyond the key/value heads hold copies."""
        decoder, ranks = self._decoder, len(self._parts)
        queries = decoder.num_heads * decoder.head_dim // ranks
        held = max(1, decoder.num_kv_heads // ranks) * decoder.head_dim
        copies = max(1, ranks // decoder.num_kv_heads)
        for leaf in self._leaves(decoder.attention_bias):
            parts = self._take(f"{name}.{leaf}")
            for part in parts:
                if part.shape[0] != queries + 2 * held:
                    raise CheckpointError(
                        f"{part.path}: {part.name} has {part.shape[0]} rows, config.json asks for {queries + 2 * held}"
                    )
            for key, start, size, owners in (
                ("q", 0, queries, parts),
                ("k", queries, held, parts[::copies]),
                ("v", queries + held, held, parts[::copies]),
            ):
                pieces = [Piece(part, range(start, start + size), row=i * size) for i, part in enumerate(owners)]
                full = f"{target}.{key}_proj.{leaf}"
                yield full, pieced(full, (len(owners) * size, *parts[0].shape[1:]), *pieces)
