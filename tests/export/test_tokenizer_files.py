"""Tokenizer files: conversion of sentencepiece models, added tokens, chat templates, control tokens."""

from __future__ import annotations

import io
import json
import random
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from checkpoints import make_checkpoint, write_tokenizer

from apar.export.control_tokens import resolve_tokens
from apar.export.errors import TokenizerError
from apar.export.llama_config import read_config
from apar.export.sentencepiece_model import convert_model, read_model
from apar.export.tokenizer_files import read_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "1. Eat fresh vegetables every day.\n\n2. Sleep well, for eight hours.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "Übermütige Bäume grüßen; l'été déjà là, «ça va»? Señor, mañana.",
    "你好，世界。日本語の文章です。 Привет, мир!",
    "def f(x):\n    return  x ** 2  # two  blanks",
]


@pytest.fixture(scope="module")
def model_bytes() -> bytes:
    """A byte-pair model with byte fallback, trained as Llama's was."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=writer,
        vocab_size=520,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return writer.getvalue()


def texts() -> list[str]:
    """Some thousands of texts: the corpus in pieces, random ASCII, random Unicode, odd blanks."""
    rng = random.Random(0)
    words = " ".join(CORPUS).split()
    made = [*CORPUS, "", " ", "  ", "\n", " a", "a ", "\t\n x", "😀😀", "e\u0301", "▁", "a▁b", "\u0000", "\x7f"]
    for _ in range(1500):
        made.append(rng.choice([" ", "  ", "\n", ""]).join(rng.choices(words, k=rng.randint(1, 20))))
        made.append("".join(rng.choices(string.printable, k=rng.randint(1, 40))))
        made.append("".join(chr(rng.choice([rng.randint(32, 0x2FF), rng.randint(0x3000, 0xD7FF)])) for _ in range(12)))
    return made


def test_parsed_model_equals_sentencepiece(model_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    model = read_model(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    assert len(model.pieces) == theirs.get_piece_size() == 520
    for token, (text, score, kind) in enumerate(model.pieces):
        assert text == theirs.id_to_piece(token)
        assert score == theirs.get_score(token)
        assert (kind == 3, kind == 6, kind == 2) == (
            theirs.is_control(token),
            theirs.is_byte(token),
            theirs.is_unknown(token),
        )


def test_converted_tokenizer_encodes_as_sentencepiece(model_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    converted = convert_model(read_model(tmp_path / "tokenizer.model"), {})
    ours = tokenizers.Tokenizer.from_str(json.dumps(converted))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    for text in texts():
        if any(special in text for special in ("<s>", "</s>", "<unk>")):
            continue  # sentencepiece never reads them from text
        expected = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        assert ours.decode(expected) == theirs.decode(expected), text
    assert ours.encode("fox").ids == [1, *theirs.encode("fox")]


@pytest.mark.parametrize("legacy", [True, False])
def test_converted_tokenizer_equals_transformers(model_bytes: bytes, legacy: bool, tmp_path: Path) -> None:
    converter = pytest.importorskip("transformers.convert_slow_tokenizer")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_bytes)
    ours = convert_model(read_model(path), {"legacy": legacy})

    scores = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    vocab = {scores.id_to_piece(i): i for i in range(len(scores))}
    by_score = {scores.id_to_piece(i): scores.get_score(i) for i in range(len(scores)) if i > 2}
    merges = converter.generate_merges(vocab, by_score)
    assert [tuple(merge) for merge in ours["model"]["merges"]] == list(merges)


def test_add_flags_and_prefix_are_followed(model_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    model = read_model(tmp_path / "tokenizer.model")

    def encode(**config: Any) -> list[str]:
        return list(tokenizers.Tokenizer.from_str(json.dumps(convert_model(model, config))).encode("fox").tokens)

    assert encode()[0] == "<s>"
    assert encode(add_bos_token=False)[0] != "<s>"
    assert encode(add_eos_token=True)[-1] == "</s>"
    assert encode(bos_token={"content": "<s>"}, legacy=False)[1].startswith("▁")
    assert not encode(add_prefix_space=False)[1].startswith("▁")


def test_checkpoint_with_sentencepiece_only(model_bytes: bytes, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tokenizer=False, vocab_size=522)
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    (tmp_path / "added_tokens.json").write_text('{"[SplitMask]": 520, "[SplitSop]": 521}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    files = read_tokenizer(tmp_path)
    tokens = resolve_tokens(read_config(tmp_path), files)
    assert (tokens.fork, tokens.child, tokens.eos, tokens.bos) == (520, 521, (2,), 1)
    (tmp_path / "out").mkdir()
    files.write(tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 522
    assert tokenizer.decode([520], skip_special_tokens=True) == "[SplitMask]"  # not special, as APAR adds it
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["bos_token"] == "<s>"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff\xff\xff", "no sentencepiece model or is damaged"),
        (b"\x0a\x7fabc", "it ends inside a field"),
        (b"", "holds no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no sentencepiece model or is damaged|holds no pieces"),
    ],
)
def test_damaged_models(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(raw)
    with pytest.raises(TokenizerError, match=message):
        read_model(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "normalization_rule_name": "identity"}, "no byte-pair model"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "normalises text"),
    ],
)
def test_other_kinds_of_models_are_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=writer, vocab_size=110, minloglevel=2, **options
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(writer.getvalue())
    with pytest.raises(TokenizerError, match=message):
        read_model(path)


def test_added_tokens_and_template_from_every_place(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, control=False)
    config = {"added_tokens_decoder": {"259": {"content": "[SplitMask]"}, "2": {"content": "</s>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    (tmp_path / "added_tokens.json").write_text('{"[SplitSop]": 260}')
    files = read_tokenizer(tmp_path)
    assert (files.ids["[SplitMask]"], files.ids["[SplitSop]"]) == (259, 260)
    assert files.config["chat_template"] == "old"
    byte_order_mark = {"encoding": "utf-8-sig"}  # as some editors write it
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}', **byte_order_mark)
    assert read_tokenizer(tmp_path).config["chat_template"] == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja", **byte_order_mark)
    assert read_tokenizer(tmp_path).config["chat_template"] == "from jinja"


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model; copy"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read as JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        read_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[New]": 5}')
    with pytest.raises(TokenizerError, match=r"added token '\[New\]' has id 5, which .* has already"):
        read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[New]": "x"}')
    with pytest.raises(TokenizerError, match="list of added tokens is damaged"):
        read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[New]": Infinity}')
    with pytest.raises(TokenizerError, match="list of added tokens is damaged"):
        read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"\\ud83d": 300}')
    with pytest.raises(TokenizerError, match="hold a lone surrogate"):
        read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[SplitMask]": 261}')
    with pytest.raises(TokenizerError, match=r"'\[SplitMask\]' has id 261 in one file and 259 in tokenizer\.json"):
        read_tokenizer(tmp_path)
    for far in (-5, 10**12):
        (tmp_path / "added_tokens.json").write_text(json.dumps({"[New]": far}))
        with pytest.raises(TokenizerError, match="ids are not between 0 and"):
            read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    words = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": words, "decoder": {"type": "WordPiece"}}))
    with pytest.raises(TokenizerError, match="has a WordPiece model"):  # at the build, not when the engine is loaded
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("text", "text"),
        ("", None),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "text"}], "text"),
    ],
)
def test_chat_templates_of_the_config(template: Any, expected: str | None, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert read_tokenizer(tmp_path).config.get("chat_template") == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "tool_use", "template": "x"}], "no chat template named 'default', only 'tool_use'; put the one"),
        ([5], "named 'default', only none"),
        ({"default": "x"}, "chat_template is no text"),
        (5, "chat_template is no text"),
    ],
)
def test_odd_chat_templates(template: Any, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        read_tokenizer(tmp_path)


def test_control_tokens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config, files = read_config(tmp_path), read_tokenizer(tmp_path)
    assert (resolve_tokens(config, files).fork, resolve_tokens(config, files).child) == (259, 260)
    tokens = resolve_tokens(config, files, "[SplitSop]", 17)
    assert (tokens.fork, tokens.child) == (260, 17)
    assert resolve_tokens(replace(config, pad=264), files).pad is None  # named, but never made: nothing is padded
    nameless = replace(files, config={}, special={})
    with pytest.raises(TokenizerError, match="the begin token has id 264, but the model has only 264 vocabulary rows"):
        resolve_tokens(replace(config, bos=264), nameless)
    assert resolve_tokens(config, files, "262", "a").fork == 262  # rows beyond the tokenizer can be named by id
    for options, message in (
        (("[Nope]", None), r"has no fork token '\[Nope\]'; either use .*, or .*--fork-token STRING or ID"),
        ((None, "264"), "child token '264' has id 264, but the model has only 264 vocabulary rows; either resize"),
        ((None, -1), "has id -1, but the model has only 264"),
        (("a", "a"), "are the same"),
        (("</s>", None), "the fork token 2 is also an end token"),
    ):
        with pytest.raises(TokenizerError, match=message):
            resolve_tokens(config, files, *options)
    write_tokenizer(tmp_path, control=False)
    with pytest.raises(TokenizerError, match=r"has no fork token '\[SplitMask\]'"):
        resolve_tokens(config, read_tokenizer(tmp_path))


def test_end_token_from_the_tokenizer_where_the_config_has_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    assert resolve_tokens(read_config(tmp_path), read_tokenizer(tmp_path)).eos == (2,)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match=r"no end token: .*add eos_token_id to config\.json"):
        resolve_tokens(read_config(tmp_path), read_tokenizer(tmp_path))


BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True}
PLAIN = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
BEGINS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *PLAIN["single"]]}


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (None, {}, 1),
        (None, {"tokenizer_class": "LlamaTokenizerFast"}, 1),
        (None, {"tokenizer_class": "PreTrainedTokenizerFast"}, None),
        (None, {"tokenizer_class": "Qwen2Tokenizer"}, None),
        (None, {"add_bos_token": False}, None),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, BEGINS]}, {"tokenizer_class": "PreTrainedTokenizerFast"}, 1),
        (BEGINS, {"add_bos_token": False}, None),
        (PLAIN, {}, None),
        (BYTE_LEVEL, {"tokenizer_class": "PreTrainedTokenizerFast"}, None),
    ],
)
def test_the_begin_token_stands_where_the_tokenizer_puts_it(
    processor: dict[str, Any] | None, settings: dict[str, Any], expected: int | None, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path)
    for name, change in (("tokenizer.json", {"post_processor": processor}), ("tokenizer_config.json", settings)):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert resolve_tokens(read_config(tmp_path), read_tokenizer(tmp_path)).bos == expected


def test_the_tokenizers_end_and_begin_count_where_the_config_has_others(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config, files = read_config(tmp_path), read_tokenizer(tmp_path)
    tokens = resolve_tokens(replace(config, eos=(9, 7), bos=8), files)
    assert (tokens.eos, tokens.bos) == ((9, 7, 2), 1)
