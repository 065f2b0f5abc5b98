"""What a `tokenizer.json` says: its tokens, their bytes, and the same tokenizer without control tokens.

Source of the file format: the `tokenizers` library's serialisation (model, pre_tokenizer, decoder, added_tokens).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import tokenizers

from apar.export.errors import TokenizerError
from apar.export.tokenizer_files import TOKENIZER_NAME
from apar.export.tokenizer_kind import BLANK, parts

REMEDY = "copy it from the checkpoint's tokenizer or build the engine again with `apar build`"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_HIDDEN_UNKNOWN = "\x00unknown\x00"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A string that the checkpoint's tokenizer maps to one id before anything else is looked at."""

    text: str
    token_id: int
    special: bool
    strips_left: bool = False
    """Blanks before it are swallowed (`lstrip` of tokenizer.json)."""
    strips_right: bool = False


def added_tokens(definition: dict[str, Any], config: dict[str, Any]) -> list[AddedToken]:
    entries: dict[int, dict[str, Any]] = {}
    try:
        for key, entry in (config.get("added_tokens_decoder") or {}).items():
            entries[int(key)] = entry
        for entry in definition.get("added_tokens") or []:
            entries[int(entry["id"])] = entry
        return [
            AddedToken(
                str(entry["content"]),
                token_id,
                bool(entry.get("special")),
                bool(entry.get("lstrip")),
                bool(entry.get("rstrip")),
            )
            for token_id, entry in sorted(entries.items())
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(f"the added tokens of {TOKENIZER_NAME} cannot be read ({error!r}); {REMEDY}") from error


def id_strings(model: dict[str, Any]) -> dict[int, str]:
    """Token strings of the model's own vocabulary by id (BPE: a map; Unigram: a list of pairs)."""
    vocab = model["vocab"]
    try:
        if isinstance(vocab, dict):
            return {int(token_id): str(string) for string, token_id in vocab.items()}
        return {token_id: str(entry[0]) for token_id, entry in enumerate(vocab)}
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(f"model.vocab of {TOKENIZER_NAME} cannot be read ({error!r}); {REMEDY}") from error


def unknown_id(model: dict[str, Any]) -> int | None:
    """Id that the model gives to characters it does not know: `<unk>`, in text an honest result."""
    unknown_id, unknown = model.get("unk_id"), model.get("unk_token")
    if unknown_id is None and isinstance(unknown, str) and isinstance(model["vocab"], dict):
        unknown_id = model["vocab"].get(unknown)
    return unknown_id if isinstance(unknown_id, int) else None


def strips_blank(definition: dict[str, Any]) -> bool:
    for part in parts(definition.get("decoder"), "decoders"):
        if part.get("type") == "Strip" and part.get("content") == " " and part.get("start", 0) > 0:
            return True
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return bool(part.get("add_prefix_space", True))
    return False


def sentencepiece_bytes(piece: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(BLANK, " ").encode("utf-8", errors="replace")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted (encoder.py of the GPT-2 release, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def byte_level_bytes(string: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in string])
    except KeyError:
        return string.encode("utf-8", errors="replace")


def neutral_definition(definition: dict[str, Any], hidden: Collection[str]) -> dict[str, Any]:
    """The tokenizer without added tokens, and with a model that cannot produce the `hidden` strings' ids."""
    try:
        model = _neutral_model(definition, hidden)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"the model of {TOKENIZER_NAME} cannot be read ({error!r}); {REMEDY}") from error
    cleared: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return {**definition, "model": model, **cleared}


def _neutral_model(definition: dict[str, Any], hidden: Collection[str]) -> dict[str, Any]:
    model = dict(definition["model"])
    unknown = model.get("unk_token")
    if isinstance(model["vocab"], dict):
        model["vocab"] = {s: i for s, i in model["vocab"].items() if s not in hidden}
        if unknown in definition["model"]["vocab"]:
            model["vocab"].pop(unknown, None)
            model["vocab"][_HIDDEN_UNKNOWN] = definition["model"]["vocab"][unknown]
            model["unk_token"] = _HIDDEN_UNKNOWN
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or [])
        gone = {*hidden, unknown}
        model["merges"] = [list(p) for p in pairs if p[0] not in gone and p[1] not in gone and "".join(p) not in gone]
    else:
        model["vocab"] = [
            [f"\x00{index}\x00" if entry[0] in hidden else entry[0], *entry[1:]]
            for index, entry in enumerate(model["vocab"])
        ]
    return model


def without_first_prefix(definition: dict[str, Any]) -> dict[str, Any] | None:
    """A variant for text after a token where the dummy blank belongs to the very beginning only; else None."""
    pre_tokenizer = definition.get("pre_tokenizer")
    if not any(part.get("prepend_scheme") == "first" for part in parts(pre_tokenizer, "pretokenizers")):
        return None
    variant = json.loads(json.dumps(pre_tokenizer))
    for part in parts(variant, "pretokenizers"):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return {**definition, "pre_tokenizer": variant}


def load_encoder(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises plain Exception for every defect of the file
        raise TokenizerError(f"{TOKENIZER_NAME} is not a tokenizer that can be loaded ({error}); {REMEDY}") from error
