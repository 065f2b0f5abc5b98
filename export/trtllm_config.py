"""`config.json` as TensorRT-LLM (up to 1.2.1) writes it beside checkpoints and engines."""

from __future__ import annotations

import dataclasses
from typing import Any

from apar.export.errors import BuildError
from apar.export.manifest import DecoderConfig, Manifest

CONFIG_NAME = "config.json"
ARCHITECTURE, MEDUSA_ARCHITECTURE = "LlamaForCausalLM", "MedusaForCausalLM"
_TOLERANCE = 1e-6


def pretrained_config(
    decoder: DecoderConfig, dtype: str, *, tp_size: int = 1, rope: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The model's part.

    `rope` is `rotary_base` and `rotary_scaling` as the checkpoint's own config has them; without it they are worked
    out from the frequencies. Raises BuildError where that is not possible: the format has no list of frequencies.
    """
    return {
        "architecture": ARCHITECTURE,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_context,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_size": decoder.head_dim,
        "qk_layernorm": False,
        "hidden_act": "silu",
        "intermediate_size": decoder.intermediate_size,
        "norm_epsilon": decoder.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tp_size, "gpus_per_node": 8, "cp_size": 1, "tp_size": tp_size, "pp_size": 1,
                    "moe_tp_size": tp_size, "moe_ep_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "mlp_bias": decoder.mlp_bias,
        "attn_bias": decoder.attention_bias,
        "rotary_embedding_dim": decoder.head_dim,
        **(rope if rope is not None else plain_rope(decoder)),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "remove_duplicated_kv_heads": False,
    }  # fmt: skip


def plain_rope(decoder: DecoderConfig) -> dict[str, Any]:
    """`rotary_base` and no scaling, for frequencies base ** (-2 i / D). Raises BuildError where they are others."""
    frequencies = decoder.rope_inv_freq
    base = frequencies[1] ** (-decoder.head_dim / 2) if len(frequencies) > 1 else 10000.0
    expected = [base ** (-2 * i / decoder.head_dim) for i in range(len(frequencies))]
    plain = all(abs(f - e) <= _TOLERANCE * e for f, e in zip(frequencies, expected, strict=True))
    if not plain or decoder.rope_scale != 1.0:
        raise BuildError("the model's RoPE is scaled, and its scaling is not known here in TensorRT-LLM's words")
    return {"rotary_base": round(base, 6 - len(str(int(base)))), "rotary_scaling": None}


def engine_config(manifest: Manifest) -> dict[str, Any]:
    """An engine's config.json: TensorRT-LLM's three keys, and the manifest's own facts as `apar`."""
    facts = manifest.tensorrt
    assert facts is not None
    try:
        model = pretrained_config(manifest.decoder, manifest.dtype, tp_size=facts.tp_size)
    except BuildError:
        model = pretrained_config(
            manifest.decoder, manifest.dtype, tp_size=facts.tp_size, rope={"rotary_base": None, "rotary_scaling": None}
        )
    return {
        "version": f"apar {manifest.apar_version}",
        "pretrained_config": model,
        "build_config": {
            "max_input_len": manifest.decoder.max_context,
            "max_seq_len": manifest.decoder.max_context,
            "max_batch_size": facts.max_rows,
            "max_beam_width": 1,
            "max_num_tokens": facts.max_tokens,
            "kv_cache_type": "PAGED",
            "strongly_typed": True,
            "plugin_config": {
                "dtype": manifest.dtype,
                "paged_kv_cache": True,
                "remove_input_padding": True,
                "tokens_per_block": manifest.block_size,
            },
        },
        "apar": {
            "abi_version": manifest.abi_version,
            "kv_dtype": manifest.kv_dtype,
            "tokens": dataclasses.asdict(manifest.tokens),
            "tensorrt": dataclasses.asdict(facts),
        },
    }
