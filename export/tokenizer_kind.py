"""Which kind of tokenizer a `tokenizer.json` describes: its tokens are byte strings, or SentencePiece pieces."""

from __future__ import annotations

from typing import Any

from apar.export.errors import TokenizerError

BLANK = "\u2581"
"""How SentencePiece writes a blank."""


def parts(node: Any, list_key: str) -> list[dict[str, Any]]:
    """The stages of a normalizer, pre-tokenizer or decoder, whether or not it is a Sequence."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    children = node.get(list_key)
    return [part for child in children for part in parts(child, list_key)] if isinstance(children, list) else []


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether tokens are GPT-2 byte strings; False: SentencePiece pieces. Raises TokenizerError for other kinds."""
    kind = definition["model"].get("type") or "BPE"
    decoders = [str(part.get("type")) for part in parts(definition.get("decoder"), "decoders")]
    if kind == "BPE" and "ByteLevel" in decoders:
        return True
    pieces = any(
        part.get("type") == "Metaspace" or (part.get("type") == "Replace" and part.get("pattern") == {"String": BLANK})
        for part in parts(definition.get("decoder"), "decoders")
    )
    if kind in ("BPE", "Unigram") and pieces:
        return False
    raise TokenizerError(
        f"tokenizer.json has a {kind} model with decoder {'+'.join(decoders) or 'none'}; APAR reads SentencePiece "
        "models (BPE or Unigram with a Metaspace or Replace decoder) and byte-level BPE"
    )
