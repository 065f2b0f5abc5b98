"""Small random checkpoints in the Hugging Face layout of every shape that APAR builds; needs transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig

FORK, CHILD = "[SplitMask]", "[SplitSop]"
VOCAB = 264
"""Rows of the embedding: the tokenizer has 261 tokens, the rest is padding, as some conversions add it."""

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 1},
    "mlp_bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 24, "num_key_value_heads": 2},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 50000.0,
        }
    },
    "rope_yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 24, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
}
"""What each variant changes in the config of `make_config`."""


def make_config(variant: str = "mha", **overrides: Any) -> PretrainedConfig:
    """The config of a decoder with 2 layers, 4 heads and hidden size 64."""
    settings: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(**(settings | VARIANTS[variant] | overrides))


def make_checkpoint(
    directory: Path,
    variant: str = "mha",
    *,
    layout: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> LlamaForCausalLM:
    """Write a random checkpoint and return its model (in float32, with the numbers as stored).

    `layout` is "safetensors", "safetensors-sharded", "bin" or "bin-sharded".
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(variant, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, 0.12)
    for parameter in model.parameters():  # not model.to(): it would round RoPE's frequencies too
        parameter.data = parameter.data.to(dtype)
    sharded = {"max_shard_size": "60KB"} if layout.endswith("-sharded") else {}
    model.save_pretrained(directory, **sharded)
    if layout.startswith("bin"):
        _to_bin(directory)
    if tokenizer:
        write_tokenizer(directory)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)
    return model


def write_tokenizer(directory: Path, *, control: bool = True) -> Tokenizer:
    """A byte-level tokenizer of 261 tokens: 3 special ones, 256 bytes, and the two control tokens at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if control:
        tokenizer.add_tokens([AddedToken(FORK, normalized=False), AddedToken(CHILD, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer


def _to_bin(directory: Path) -> None:
    """Turn a directory's safetensors files into torch's own."""
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    for path in sorted(directory.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(path), directory / name)
        path.unlink()
    if index.is_file():
        data = json.loads(index.read_text(encoding="utf-8"))
        data["weight_map"] = {
            name: shard.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            for name, shard in data["weight_map"].items()
        }
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(data), encoding="utf-8")
        index.unlink()


def make_heads(
    directory: Path, count: int = 3, blocks: int = 2, *, tied: bool = False, seed: int = 0, hidden: int = 64
) -> dict[str, torch.Tensor]:
    """Random Medusa heads by their FasterDecoding names. `tied`: no last matrices, the model's own is used."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for head in range(count):
        for block in range(blocks):
            tensors[f"{head}.{block}.linear.weight"] = torch.randn(hidden, hidden, generator=generator) * 0.1
            tensors[f"{head}.{block}.linear.bias"] = torch.randn(hidden, generator=generator) * 0.1
        if not tied:
            tensors[f"{head}.{blocks}.weight"] = torch.randn(VOCAB, hidden, generator=generator) * 0.1
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"medusa_num_heads": count, "medusa_num_layers": blocks}
    if tied:
        config["medusa_tied_lm_head"] = True
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(tensors, directory / "medusa_lm_head.pt")
    return tensors
