"""What the fields of a manifest may be: types as declared, sizes that fit each other. The file may say anything."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apar.export.manifest import DecoderConfig, Manifest, TensorRtEngine, TokenIds

DTYPES = ("float32", "float16", "bfloat16")
KV_DTYPES = ("float32", "float16")
QUANTIZATIONS = ("none", "int8", "int4")
METHODS = ("rtn", "gptq")
"""How codes of quantised matrices are chosen: round to nearest, or with error compensation."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int, "float": (int, float), "str": str, "bool": bool, "int | None": (int, type(None)),
    "dict[str, int]": dict, "dict[str, str]": dict,
}  # fmt: skip
_MAY_BE_0 = ("group_size", "engine_id", "bos", "pad", "fork", "child", "rms_norm_eps", "blocks")
_MOST = {"num_layers": 1 << 14, "count": 256, "blocks": 256, "tp_size": 1 << 12}
"""So that a wrong number does not become an hour of counting."""
_LARGEST = 2**31 - 1


def check(manifest: Manifest) -> None:
    """Raise TypeError or ValueError, which say the field and its value, where a manifest cannot be an engine's."""
    for part in (manifest, manifest.decoder, manifest.tokens, manifest.draft_heads, manifest.tensorrt):
        if part is not None:
            _check_fields(part)
    _check_decoder(manifest.decoder)
    _check_tokens(manifest.tokens, manifest.decoder.vocab_size)
    # TensorRT's pools have the type of its weights.
    pools = DTYPES if manifest.tensorrt is not None else KV_DTYPES
    if manifest.dtype not in DTYPES or manifest.kv_dtype not in pools or manifest.quantize not in QUANTIZATIONS:
        raise ValueError(f"types are {manifest.dtype}, {manifest.kv_dtype} and {manifest.quantize}")
    if manifest.quantize_method not in ("none", *METHODS):
        raise ValueError(f"quantize_method is {manifest.quantize_method!r}")
    if manifest.tensorrt is not None:
        _check_tensorrt(manifest.tensorrt)
    _check_files(manifest)


def _check_fields(part: Any) -> None:
    """Types as the dataclass declares them, and numbers of a size that means something."""
    for declared in dataclasses.fields(part):
        name, wanted = declared.name, _TYPES.get(str(declared.type))
        value = getattr(part, name)
        if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise TypeError(f"{name} is {value!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 0 if name in _MAY_BE_0 else 1 if isinstance(value, int) and declared.type != "float" else math.ulp(0.0)
        if not least <= value <= _MOST.get(name, _LARGEST):
            raise ValueError(f"{name} is {value}")


def _check_decoder(decoder: DecoderConfig) -> None:
    if decoder.num_heads % decoder.num_kv_heads:
        raise ValueError(f"num_heads is {decoder.num_heads}, no multiple of num_kv_heads {decoder.num_kv_heads}")
    if 2 * len(decoder.rope_inv_freq) != decoder.head_dim:
        raise ValueError(f"rope_inv_freq has {len(decoder.rope_inv_freq)} numbers, head_dim is {decoder.head_dim}")
    if not all(math.isfinite(frequency) for frequency in decoder.rope_inv_freq):
        raise ValueError("rope_inv_freq holds a number that is not finite")


def _check_tokens(tokens: TokenIds, vocab_size: int) -> None:
    if not tokens.eos:
        raise ValueError("eos is empty")
    named = {"fork": tokens.fork, "child": tokens.child, "bos": tokens.bos, "pad": tokens.pad}
    for name, token in [*named.items(), *(("eos", token) for token in tokens.eos)]:
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name} is {token}, vocab_size is {vocab_size}")
    if tokens.fork == tokens.child or {tokens.fork, tokens.child} & {*tokens.eos}:
        raise ValueError(f"fork {tokens.fork}, child {tokens.child} and eos {list(tokens.eos)} are not all different")


def _check_tensorrt(facts: TensorRtEngine) -> None:
    if facts.max_tokens < 2 * facts.max_rows:
        raise ValueError(f"max_tokens is {facts.max_tokens}, less than twice max_rows {facts.max_rows}")
    if facts.kv_fraction > 1:
        raise ValueError(f"kv_fraction is {facts.kv_fraction}")


def _check_files(manifest: Manifest) -> None:
    sizes: dict[Any, Any] = manifest.files
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise TypeError(f"files is {manifest.files!r}")
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"files names {name!r}, which is no file of the directory")
    digests: dict[Any, Any] = manifest.sha256
    for name, digest in digests.items():
        if name not in manifest.files or not isinstance(digest, str):
            raise ValueError(f"sha256 has {name!r}: {digest!r}")
