"""Small tokenizers for tests: a SentencePiece model trained on the spot, its tokenizer.json, a byte-level BPE."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from apar.export.manifest import TokenIds
from apar.runtime.tokenizer import Tokenizer

VOCAB = 600
TOKENS = TokenIds(fork=VOCAB, child=VOCAB + 1, eos=(2,), bos=1, pad=0)
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: </s> <s>",
    "1. Eat well: vegetables and fruit every day.\n\n2. Sleep: eight hours a night.",
    "[SplitMask] [SplitSop] Split Mask Sop <unk> </s></s></s><s><s>",
    "a < b, c / d, e > f: [x] </tag> <s >",
    "der Baum, die Bäume; 日本語の文章。",
]


@lru_cache
def sentencepiece_model() -> bytes:
    """A BPE model with byte fallback, like Llama's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _added(content: str, token_id: int, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": token_id, "content": content, "special": special, **flags}


ADDED = [
    _added("<unk>", 0, True),
    _added("<s>", 1, True),
    _added("</s>", 2, True),
    _added("[SplitMask]", TOKENS.fork, False),
    _added("[SplitSop]", TOKENS.child, False),
]


@lru_cache
def _sentencepiece_json() -> str:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    for index in range(len(pieces), VOCAB):
        ids[f"\u2581unused{index}"] = index
    # Every split of a piece into two pieces is a merge, in the order of the merged pieces: how Llama's files are made.
    # "</s>" and "<s>" are spelled by merges here, as in files in the wild, so that tests see them refused.
    merges = [
        [piece[:n], piece[n:]]
        for piece in sorted(pieces, key=lambda p: ids[p])
        for n in range(1, len(piece))
        if piece[:n] in ids and piece[n:] in ids
    ]
    for extra, (left, right) in enumerate((("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>"))):
        ids.setdefault(left + right, VOCAB + 2 + extra)
        merges = [[left, right], *(merge for merge in merges if merge != [left, right])]
    definition = {
        "version": "1.0",
        "added_tokens": ADDED,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges,
        },
    }
    return json.dumps(definition)


def sentencepiece_definition() -> dict[str, Any]:
    """tokenizer.json of the SentencePiece model, in the form of Llama's own ("legacy") file."""
    return json.loads(_sentencepiece_json())


@lru_cache
def _byte_level_json() -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2,
        special_tokens=["<|begin|>", "<|end|>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] += [_added("[SplitMask]", TOKENS.fork, False), _added("[SplitSop]", TOKENS.child, False)]
    return json.dumps(definition)


def byte_level_definition() -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE tokenizer, like Llama 3's."""
    return json.loads(_byte_level_json())


@lru_cache
def sentencepiece_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """The tokenizer that most tests use."""
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(sentencepiece_definition(), TOKENS, config=config, chat_template=chat_template)


@lru_cache
def byte_level_tokenizer() -> Tokenizer:
    """Its byte-level counterpart (begin 0, end 1)."""
    return Tokenizer(byte_level_definition(), dataclasses.replace(TOKENS, bos=0, eos=(1,), pad=None))


def write_engine_tokenizer(directory: Path, **config: Any) -> None:
    """Put the SentencePiece tokenizer's files into `directory`."""
    (directory / "tokenizer.json").write_text(_sentencepiece_json(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")
