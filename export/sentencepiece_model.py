"""sentencepiece's `tokenizer.model`, read by hand and converted to a `tokenizer.json`.

The file is a protobuf message (sentencepiece_model.proto): field 1 of ModelProto is a piece (1 text,
2 score, 3 type), field 2 the trainer's settings, field 3 the normaliser's. Conversion follows what
Llama's fast tokenizer does: a byte-pair model whose merges are all pairs of pieces that make a piece, by
score. tests/export/test_tokenizer_files.py holds it against sentencepiece itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apar.export.errors import TokenizerError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_SPACE = "▁"


@dataclass(slots=True)
class SentencePieceModel:
    """What conversion needs of a model."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """Text, score, type."""
    model_type: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""


def read_model(path: Path) -> SentencePieceModel:
    """Parse a `tokenizer.model`. Raises TokenizerError if it is damaged or of no type that Llama uses."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(piece[2]))[0] if 2 in piece else 0.0
                model.pieces.append((_bytes(piece[1]).decode("utf-8"), score, _int(piece.get(3, _NORMAL))))
            elif number == 2:
                trainer = dict(_fields(_bytes(value)))
                model.model_type = _int(trainer.get(3, 1))
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(_bytes(value)))
                model.charsmap = _bytes(normalizer.get(2, b""))
                model.add_dummy_prefix = bool(normalizer.get(3, 1))
                model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise TokenizerError(f"{path} is no sentencepiece model or is damaged ({error}); copy it again") from error
    if not model.pieces:
        raise TokenizerError(f"{path} holds no pieces; copy it again")
    if model.model_type != _BPE:
        raise TokenizerError(f"{path} is no byte-pair model as Llama's is; convert it to tokenizer.json first")
    if model.charsmap or model.remove_extra_whitespaces:
        raise TokenizerError(f"{path} normalises text, which Llama's does not; convert it to tokenizer.json first")
    return model


def convert_model(model: SentencePieceModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` of a Llama model, given also its `tokenizer_config.json`."""
    vocab: dict[str, int] = {}
    added = []
    unknown = None
    for token, (text, _, kind) in enumerate(model.pieces):
        vocab.setdefault(text, token)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added.append(
                {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
                | {"normalized": False, "special": kind != _USER_DEFINED}
            )
        if kind == _UNKNOWN:
            unknown = text
    prefix = model.add_dummy_prefix and config.get("add_prefix_space") is not False
    legacy = config.get("legacy") is not False
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(prefix) if legacy else None,
        "pre_tokenizer": None
        if legacy
        else {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "post_processor": _post_processor(vocab, config),
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model, vocab),
        },
    }


def _normalizer(prefix: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    return {"type": "Sequence", "normalizers": [*prepend, replace]}


def _post_processor(vocab: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """The begin and end tokens that encoding adds: by default only the first."""

    def wanted(role: str, default: bool, text: str) -> list[str]:
        given = config.get(f"{role}_token", text)
        name = given.get("content", text) if isinstance(given, dict) else given
        switch = config.get(f"add_{role}_token")
        return [name] if (default if switch is None else switch) and name in vocab else []

    before, after = wanted("bos", True, "<s>"), wanted("eos", False, "</s>")

    def template(kind: str, type_id: int) -> list[dict[str, Any]]:
        def special(name: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": name, "type_id": type_id}}

        middle = {"Sequence": {"id": kind, "type_id": type_id}}
        return [*map(special, before), middle, *map(special, after)]

    tokens = {name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": tokens,
    }


def _merges(model: SentencePieceModel, vocab: Mapping[str, int]) -> list[list[str]]:
    """Every way to make a piece of two pieces, the best scores first."""
    merges: list[tuple[float, str, str]] = []
    for text, score, kind in model.pieces:
        if kind not in (_NORMAL, _USER_DEFINED, _UNUSED):
            continue
        pairs = ((text[:i], text[i:]) for i in range(1, len(text)))
        found = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += [(score, *pair) for pair in sorted(found, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    # Stable, so that equal scores keep the order above.
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in merges]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message: varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        length, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + length > len(data):
            raise ValueError("it ends inside a field")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a varint is too long")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where text should")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("text stands where a number should")
    return value
