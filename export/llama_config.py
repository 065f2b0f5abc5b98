"""`config.json` of a checkpoint of Llama, Mistral or Qwen2, read into a DecoderConfig.

The three have one decoder. Mistral's attention window, and Qwen2's where it is switched on, hides nothing in contexts
no longer than the window, and the engine is built for those; Qwen2 has biases at q, k and v alone. Everything else that
would change the decoder's arithmetic and that the graph does not have is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apar.export.checkpoint_hints import what_is_there
from apar.export.errors import CheckpointError
from apar.export.manifest import DecoderConfig
from apar.export.rope import rope_from_config

CONFIG_NAME = "config.json"
_MODELS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""`model_type`s that are built, and their architectures."""
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""Keys that tell of weights in fewer bits: Hugging Face's, an earlier one of compressed-tensors, MLX's."""
_DEFAULT_WINDOW = 4096
"""Of Mistral and Qwen2, where the config is silent."""
_LARGEST_SIZE = 1 << 24
"""No size in a config.json of any Llama is larger; a larger one is a damaged file, and would only cost memory."""


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A checkpoint's shape and the token ids it names itself."""

    decoder: DecoderConfig
    context_limit: int
    """Longest context that RoPE and an attention window allow; `decoder.max_context` is what config.json asks for."""
    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    output_bias: bool = True
    """With `decoder.attention_bias`: the checkpoint has o_proj.bias, too; False (Qwen2): it is zero."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def read_config(directory: Path) -> LlamaConfig:
    """Read `config.json` and `generation_config.json` (for further end tokens) of a checkpoint directory."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        remedy = what_is_there(directory) or "give the directory of a checkpoint in the Hugging Face layout"
        raise CheckpointError(f"{directory} holds no {CONFIG_NAME}; {remedy}")
    generation = directory / "generation_config.json"
    return config_from(read_json(path), path, read_json(generation) if generation.is_file() else {})


def config_from(config: Mapping[str, Any], path: Path, generation: Mapping[str, Any]) -> LlamaConfig:
    """The same of contents that were read: `config`, of the file `path`, and `generation_config.json`.

    Raises CheckpointError where the model is not one that APAR builds.
    """
    model = _supported_model(config, path)
    hidden = _positive(config, "hidden_size", path)
    heads = _positive(config, "num_attention_heads", path)
    kv_heads = _positive(config, "num_key_value_heads", path, default=heads)
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = _positive(config, "head_dim", path, default=hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd, RoPE needs an even one")
    max_position = _positive(config, "max_position_embeddings", path, default=2048)
    try:
        rope = rope_from_config(config, head_dim, max_position)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    window = _window(config, model, path)
    decoder = DecoderConfig(
        vocab_size=_positive(config, "vocab_size", path),
        hidden_size=hidden,
        num_layers=_positive(config, "num_hidden_layers", path),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_positive(config, "intermediate_size", path),
        rms_norm_eps=_epsilon(config, path),
        max_context=min(max_position, window),
        rope_inv_freq=rope.inv_freq,
        rope_scale=rope.scale,
        attention_bias=model == "qwen2" or (model == "llama" and bool(config.get("attention_bias", False))),
        mlp_bias=model == "llama" and bool(config.get("mlp_bias", False)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    more = path.with_name("generation_config.json")
    eos = dict.fromkeys(_token_ids(generation, "eos_token_id", more) + _token_ids(config, "eos_token_id", path))
    for token in eos:
        if token >= decoder.vocab_size:
            raise CheckpointError(f"{path}: eos_token_id {token} is not below vocab_size {decoder.vocab_size}")
    return LlamaConfig(
        decoder=decoder,
        context_limit=min(rope.context_limit, window),
        eos=tuple(eos),
        bos=next(iter(_token_ids(config, "bos_token_id", path) + _token_ids(generation, "bos_token_id", more)), None),
        pad=next(iter(_token_ids(config, "pad_token_id", path) + _token_ids(generation, "pad_token_id", more)), None),
        output_bias=model != "qwen2",
    )


def _supported_model(config: Mapping[str, Any], path: Path) -> str:
    """Its `model_type`. Raises CheckpointError where APAR has no decoder for it."""
    kind = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"{path}: architectures must be a list of names, not {architectures!r}")
    if kind is None:
        kind = next((model for model, name in _MODELS.items() if name in architectures), None)
    if not isinstance(kind, str) or kind not in _MODELS:
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported; APAR builds {', '.join(_MODELS)}")
    if architectures and _MODELS[kind] not in architectures:
        raise CheckpointError(
            f"{path}: architecture {', '.join(map(str, architectures))} is not supported for model_type {kind!r}; "
            f"APAR builds {_MODELS[kind]}"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; APAR builds 'silu'")
    if quantized := next((config[key] for key in _QUANTIZED if config.get(key)), None):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, Mapping) else quantized
        raise CheckpointError(
            f"{path}: the checkpoint is quantised already ({method}), which is not supported; "
            "give the float checkpoint and quantise in the build (--quantize)"
        )
    return kind


def _window(config: Mapping[str, Any], model: str, path: Path) -> int:
    """Longest context in which no token is outside the attention window of another."""
    used = model == "mistral" or (model == "qwen2" and config.get("use_sliding_window", False))
    if not used or config.get("sliding_window", _DEFAULT_WINDOW) is None:
        return _LARGEST_SIZE
    return _positive(config, "sliding_window", path, default=_DEFAULT_WINDOW)


def _positive(config: Mapping[str, Any], key: str, path: Path, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{path}: {key} must be a positive integer, not {value!r}")
    if value > _LARGEST_SIZE:
        raise CheckpointError(f"{path}: {key} is {value}, which no Llama has; copy the file again")
    return value


def _epsilon(config: Mapping[str, Any], path: Path) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise CheckpointError(f"{path}: rms_norm_eps must be a small positive number, not {value!r}")
    return float(value)


def _token_ids(config: Mapping[str, Any], key: str, path: Path) -> list[int]:
    """A token id, or a list of them; absent, null and -1 (older checkpoints' "none") are no token."""
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, (int, type(None))) for v in values):
        raise CheckpointError(f"{path}: {key} must be a token id or a list of them, not {value!r}")
    return [v for v in values if v is not None and v >= 0]
