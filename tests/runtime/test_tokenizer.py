"""Encoding without control tokens, token bytes, incremental detokenisation, stop strings."""

from __future__ import annotations

import itertools
import time

import pytest
import tokenizer_files
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import TOKENS, byte_level_tokenizer, sentencepiece_definition, sentencepiece_tokenizer

from apar.export.errors import CapacityError, RequestError, TokenizerError
from apar.export.manifest import DecoderConfig, Manifest, TokenIds
from apar.runtime.detokenizer import IncrementalDetokenizer, StopChecker, StopStrings
from apar.runtime.tokenizer import Tokenizer

CONTROL = ["[SplitMask]", "[SplitSop]", "</s>", "<s>", "<unk>", "<|begin|>", "<|end|>"]
TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n▁[]<>/sSplitMaskop")), max_size=60
)
MIXED = st.lists(st.one_of(TEXT, st.sampled_from(CONTROL)), max_size=6).map("".join)


@pytest.fixture(params=["sentencepiece", "byte_level"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return sentencepiece_tokenizer() if request.param == "sentencepiece" else byte_level_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        *CONTROL,
        "a [SplitMask] b",
        "[SplitMask][SplitSop]</s>",
        "[Split\u200bMask]",
        "[Split\u2060Mask]\u200d</s\u200d>",
        "\uff3bSplitMask\uff3d",
        "\uff1c/s\uff1e",
        "\u2581</s>\u2581",
        "[ SplitMask ]",
        "\n</s>\n",
        "\x00</s>\x00",
        "<</s>/s>",
        "[SplitMas[SplitMask]k]",
    ],
)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.silent_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text.replace("\u2581", " " if tokenizer.strips_blank else "\u2581")


def test_normalised_text_never_becomes_a_control_token() -> None:
    definition = sentencepiece_definition()
    definition["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
    tokenizer = Tokenizer(definition, TOKENS)
    for text in ("\uff3bSplitMask\uff3d", "\uff1c/s\uff1e", "\uff1cs\uff1e"):
        assert tokenizer.silent_ids.isdisjoint(tokenizer.encode_text(text))


def test_the_file_itself_would_have_let_control_tokens_in() -> None:
    import json

    import tokenizers

    plain = tokenizers.Tokenizer.from_str(json.dumps({**sentencepiece_definition(), "added_tokens": []}))
    assert 2 in plain.encode("</s>").ids, "the test's tokenizer spells </s> by merges"


@given(MIXED)
@settings(max_examples=150, deadline=None)
def test_text_survives_the_round_trip(text: str) -> None:
    for tokenizer in (sentencepiece_tokenizer(), byte_level_tokenizer()):
        ids = tokenizer.encode_text(text)
        assert tokenizer.silent_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text.replace("\u2581", " " if tokenizer.strips_blank else "\u2581")


def test_plain_text_encodes_as_sentencepiece_does() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_files.sentencepiece_model())
    for text in ("The assistant gives answers.", " two  blanks ", "1. Eat\n\n2. Sleep", "日本語 😀", "x"):
        assert sentencepiece_tokenizer().encode_text(text) == processor.encode(text)


def test_each_stretch_of_text_has_its_own_dummy_blank() -> None:
    tokenizer = sentencepiece_tokenizer()
    hello, you = tokenizer.encode_text("hello"), tokenizer.encode_text("you and")
    assert tokenizer.encode_segments([1, "hello", 2, "you", " and"]) == [1, *hello, 2, *you]
    assert tokenizer.encode_segments([]) == []
    assert tokenizer.encode_segments(["", 2, ""]) == [2]


def test_a_prefix_for_the_first_stretch_only_is_obeyed() -> None:
    definition = sentencepiece_definition()
    definition["normalizer"] = None
    definition["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    tokenizer = Tokenizer(definition, TOKENS)
    first = tokenizer.encode_text("user")
    rest = tokenizer.encode_segments([2, "user"])[1:]
    assert tokenizer.encode_segments(["user", 2]) == [*first, 2]
    assert first != rest
    assert b"".join(map(tokenizer.token_bytes, first)) == b" user"
    assert b"".join(map(tokenizer.token_bytes, rest)) == b"user"


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        tokenizer.encode_segments([len(tokenizer)])
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.token_bytes(-1)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 1"):
        tokenizer.encode_text("a\ud83d")


def test_a_long_text_is_refused_before_any_work() -> None:
    tokenizer = Tokenizer(sentencepiece_definition(), TOKENS, max_chars=10)
    assert tokenizer.encode_text("x" * 10)
    with pytest.raises(CapacityError, match="11 characters"):
        tokenizer.encode_text("x" * 11)


@pytest.mark.parametrize("unit", ["a", "</s>", "[SplitMask]", "\n", "1"])
def test_time_grows_with_the_length(tokenizer: Tokenizer, unit: str) -> None:
    def seconds(chars: int) -> float:
        text = unit * (chars // len(unit))
        best = float("inf")
        for _ in range(3):
            start = time.thread_time()
            tokenizer.encode_text(text)
            best = min(best, time.thread_time() - start)
        return best

    small, large = seconds(20_000), seconds(200_000)
    assert large < 40 * small + 0.2, "ten times the text: quadratic work would take a hundred times as long"


def test_tokens_without_text(tokenizer: Tokenizer) -> None:
    for token_id in (tokenizer.tokens.fork, tokenizer.tokens.child, *tokenizer.tokens.eos):
        assert tokenizer.token_bytes(token_id) == b""


def test_byte_tokens_and_padding_rows() -> None:
    tokenizer = Tokenizer(sentencepiece_definition(), TOKENS, vocab_size=5000)
    assert len(tokenizer) == 5000
    assert tokenizer.token_bytes(4999) == b""
    assert [tokenizer.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_text_beyond_the_models_rows_is_refused() -> None:
    """A tokenizer of another model must not reach the embedding, where one such id fails the whole step."""
    tokenizer = Tokenizer(sentencepiece_definition(), TokenIds(fork=10, child=11, eos=(2,), bos=1), vocab_size=300)
    with pytest.raises(TokenizerError, match=r"text became token \d+, but the model has only 300 vocabulary rows"):
        tokenizer.encode_text("A curious user")
    assert sentencepiece_tokenizer().encode_text("A curious user")


def test_byte_level_tokens_cover_all_bytes() -> None:
    tokenizer = byte_level_tokenizer()
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.bytes_table)


def test_an_engine_directory(tmp_path) -> None:
    tokenizer_files.write_engine_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    manifest = Manifest(DecoderConfig(610, 8, 1, 1, 1, 8, 8, 1e-6, 128, (1.0,) * 4), TOKENS, block_size=16)
    tokenizer = Tokenizer.load(tmp_path, manifest)
    assert len(tokenizer) >= 610
    assert tokenizer.special_string("bos_token") == "<s>"
    longest = max(len(tokenizer.token_bytes(i)) for i in range(len(tokenizer)))
    with pytest.raises(CapacityError):
        tokenizer.encode_text("x" * (128 * longest + 1))
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.load(tmp_path, manifest).chat_template == "own file"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read as JSON"):
        Tokenizer.load(tmp_path, manifest)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(TokenizerError, match=r"no model\.vocab"):
        Tokenizer.load(tmp_path, manifest)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path, manifest)


def test_other_kinds_are_named() -> None:
    definition = sentencepiece_definition()
    definition["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    definition["model"]["type"] = "WordPiece"
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(definition, TOKENS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added_tokens": [{"id": "x"}]}, "added tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": "b"}}}, "vocab"),
        ({"normalizer": {"type": "nothing"}}, "not a tokenizer"),
        ({"added_tokens": [{"id": 10**20, "content": "x"}]}, "has ids from 0 to 1" + "0" * 20),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "has ids from -1"),
        ({"added_tokens": [{"id": float("inf"), "content": "x"}]}, "added tokens"),
        ({"model__unk_token": {}}, "model of tokenizer.json cannot be read"),
        ({"model__merges": [["a", 1.5]]}, "model of tokenizer.json cannot be read"),
        ({"model__merges": [[["a"], "b"]]}, "model of tokenizer.json cannot be read"),
        ({"decoder": {"type": "Sequence", "decoders": 5}}, "decoder none"),
        ({"decoder": {"type": "Replace", "pattern": "x", "content": " "}}, "decoder Replace"),
    ],
)
def test_a_damaged_file_is_named(change: dict, message: str) -> None:
    definition = sentencepiece_definition()
    for name, value in change.items():
        part, _, field = name.partition("__")
        if field:
            definition[part][field] = value
        else:
            definition[part] = value
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(definition, TOKENS)


def test_control_ids_outside_the_vocabulary() -> None:
    with pytest.raises(TokenizerError, match="99999"):
        Tokenizer(sentencepiece_definition(), TokenIds(99999, 601, (2,)))


def chunks(items: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 601), max_size=40), st.lists(st.integers(0, 40), max_size=8), st.booleans())
@settings(max_examples=300, deadline=None)
def test_chunks_of_tokens_do_not_change_the_text(ids: list[int], cuts: list[int], starts: bool) -> None:
    for tokenizer in (sentencepiece_tokenizer(), byte_level_tokenizer()):
        detokenizer = IncrementalDetokenizer(tokenizer, starts)
        text = "".join(detokenizer.feed(chunk) for chunk in chunks(ids, cuts)) + detokenizer.flush()
        assert text == tokenizer.decode(ids, starts)


def test_incomplete_characters_wait() -> None:
    tokenizer = sentencepiece_tokenizer()
    smile = [3 + byte for byte in "😀".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.feed([i]) for i in smile] == ["", "", "", "😀"]
    assert detokenizer.feed(smile[:2]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.feed([smile[0], 3 + ord("a")]) == "\ufffda"


def test_one_blank_at_the_start_of_a_piece_is_dropped() -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode_text(" two")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.feed([]) == ""
    assert detokenizer.feed([TOKENS.child]) == "", "a control token does not use up the blank"
    assert "".join(detokenizer.feed([i]) for i in ids) == " two"
    assert detokenizer.flush() == ""
    assert "".join(detokenizer.feed([i]) for i in ids) == " two", "a flush starts a new piece"
    going_on = IncrementalDetokenizer(tokenizer, starts_piece=False)
    assert "".join(going_on.feed([i]) for i in ids) == "  two"
    plain = IncrementalDetokenizer(byte_level_tokenizer())
    assert plain.feed(byte_level_tokenizer().encode_text(" two")) == " two"


def stopped(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """What a stop check is to find, by trying everything."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s and s in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include_stop else end - len(stop)], stop


@given(
    st.text("ab\n", max_size=40),
    st.lists(st.text("ab\n", max_size=5), max_size=5),
    st.lists(st.integers(0, 40), max_size=10),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_are_found_across_chunks(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    checker = StopChecker(stops, include)
    out = "".join(checker.feed("".join(c)) for c in chunks(list(text), cuts)) + checker.flush()  # type: ignore[arg-type]
    assert (out, checker.hit) == stopped(text, stops, include)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["###", "\n\nUSER:"])
    assert checker.feed("abc#") == "abc"
    assert checker.feed("d\n\nUS") == "#d"
    assert checker.feed("A\n") == "\n\nUSA"
    assert checker.flush() == "\n"
    assert checker.feed("##") == "" and checker.flush() == "##"
    assert checker.feed("#x") == "#x", "a flush forgets: a stop string never reaches over a fork"
    assert checker.feed("y###z") == "y"
    assert checker.hit == "###"
    assert checker.feed("more") == ""


def test_many_stop_strings_cost_linear_time() -> None:
    stops = StopStrings("a" * n + "b" for n in range(192, 256))
    checker = StopChecker(stops)
    text = "a" * 50_000
    start = time.thread_time()
    assert len(checker.feed(text)) == 50_000 - 255
    assert time.thread_time() - start < 1.0
