"""The tiny model's data set and the checkpoint that ships with it."""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "export" / "models" / "tiny"
sys.path.insert(0, str(ROOT / "scripts"))

from tiny_corpus import CHILD, EOS, FORK, SYSTEM, Conversation, Corpus, as_apar_format, prompt  # noqa: E402
from tiny_topics import CATEGORIES  # noqa: E402


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return list(islice(Corpus().train(0), 2000))


def test_there_are_enough_topics_and_all_columns_are_filled() -> None:
    topics = [topic for category in CATEGORIES for topic in category.topics()]
    assert len(topics) >= 120
    assert all(value for topic in topics for value in topic.values())
    assert len({topic["x"] for topic in topics}) == len(topics)


def test_rows_of_a_conversation_are_well_formed(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        main, *streams = conversation.rows()
        assert main.startswith(" ") and main.endswith(EOS)
        assert main.count(FORK) == len(streams)
        assert CHILD not in main and main.count(EOS) == 1
        position = 0
        for row in streams:
            shared, detail = row.split(CHILD)
            position = main.index(FORK, position) + len(FORK)
            assert shared == main[:position]
            assert detail.endswith(EOS) and detail.count(EOS) == 1
            assert FORK not in detail and detail[: -len(EOS)].strip()


def test_no_blank_or_newline_stands_beside_a_control_token(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        for row in conversation.rows():
            assert not re.search(rf"\s({re.escape(FORK)}|{re.escape(CHILD)}|{EOS})", row)
            assert not re.search(rf"({re.escape(FORK)}|{re.escape(CHILD)})\s", row)


def test_plain_answers_have_no_control_token_and_the_others_fork(conversations: list[Conversation]) -> None:
    kinds = set()
    for conversation in conversations:
        turn = conversation.turns[-1]
        kinds.add(turn.kind)
        if turn.kind == "plain":
            assert conversation.rows() == [f" {turn.answer.assembled()}{EOS}"]
        else:
            assert 3 <= len(turn.answer.nodes) <= 8
    assert kinds == {"list", "paragraph", "plain"}


def test_list_items_are_numbered_and_assembled_on_their_own_lines(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        answer = conversation.turns[-1].answer
        if conversation.turns[-1].kind == "list":
            paragraphs = answer.assembled().split("\n\n")
            items = paragraphs[1 : len(answer.nodes) + 1]
            for number, (item, (_, detail)) in enumerate(zip(items, answer.nodes, strict=True), 1):
                title, text = item.split("\n")
                assert re.fullmatch(rf"{number}\. .+:", title)
                assert text == detail


def test_some_main_paths_end_on_a_fork_and_some_with_a_sentence(conversations: list[Conversation]) -> None:
    endings = {bool(c.turns[-1].answer.ending) for c in conversations if c.turns[-1].answer.nodes}
    assert endings == {True, False}


def test_earlier_turns_stand_re_assembled_in_the_prompt(conversations: list[Conversation]) -> None:
    several = [conversation for conversation in conversations if len(conversation.turns) > 1]
    assert len(several) > 50
    for conversation in several:
        text = prompt(conversation.messages())
        assert text.startswith(f"{SYSTEM} USER: ") and text.endswith(" ASSISTANT:")
        assert FORK not in text and CHILD not in text
        assert text.count(f"{EOS}USER: ") == len(conversation.turns) - 1
        assert conversation.turns[0].answer.assembled() in text


def test_apar_fields(conversations: list[Conversation]) -> None:
    conversation = next(c for c in conversations if c.turns[-1].kind == "list")
    rows = as_apar_format(conversation, 7)
    assert [row["index"] for row in rows] == ["7_main", *(f"7_{i}" for i in range(len(rows) - 1))]
    assert rows[0]["input"] == conversation.turns[-1].question
    assert str(rows[1]["target"]).count(FORK + CHILD) == 1
    assert EOS not in str(rows[0]["target"])


def test_the_data_follows_from_the_seed(conversations: list[Conversation]) -> None:
    assert list(islice(Corpus().train(0), 500)) == conversations[:500]
    assert list(islice(Corpus().train(1), 500)) != conversations[:500]
    assert Corpus().held_out() == Corpus().held_out()


def _plain_words(messages: list[dict[str, str]]) -> str:
    return re.sub(r"[.?!]+(?=\")", "", json.dumps(messages)).lower()


def test_no_held_out_prompt_is_trained() -> None:
    held_out = {_plain_words(entry["messages"]) for entry in Corpus().held_out()}  # type: ignore[arg-type]
    trained = {_plain_words(conversation.messages()) for conversation in islice(Corpus().train(0), 5000)}
    assert not held_out & trained


def test_held_out_pairs_are_never_asked_in_training(conversations: list[Conversation]) -> None:
    corpus = Corpus()
    rng = random.Random(0)
    trained = {(turn.kind, turn.answer.main().split(FORK)[0].split("\n")[0]) for c in conversations for turn in c.turns}
    answered = 0
    for category in CATEGORIES:
        for topic in category.topics():
            for kind in (*category.lists, *category.prose, *category.plain):
                turn = corpus.ask(rng, category, topic, kind, False)
                key = (turn.kind, turn.answer.main().split(FORK)[0].split("\n")[0])
                if (category.name, topic["x"], kind) in corpus.excluded:
                    assert key not in trained
                answered += key in trained
    assert answered > 300


def test_held_out_entries() -> None:
    entries = Corpus().held_out()
    assert 100 <= len(entries) <= 120
    assert {entry["category"] for entry in entries} == {"list", "paragraph", "plain", "multi-turn", "unseen-pair"}
    assert len({entry["id"] for entry in entries}) == len(entries)
    for entry in entries:
        assert FORK not in str(entry["expected"]) and CHILD not in str(entry["expected"])


def test_shipped_folder_is_small_and_complete() -> None:
    names = {
        "README.md", "added_tokens.json", "config.json", "generation_config.json", "heldout.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    assert names <= {path.name for path in SHIPPED.iterdir()}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 16 * 2**20


def test_shipped_control_tokens_follow_the_base_vocabulary() -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    added = json.loads((SHIPPED / "added_tokens.json").read_text())
    tokenizer = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    base = config["vocab_size"] - 2
    assert added == {FORK: base, CHILD: base + 1}
    for content, number in added.items():
        entry = tokenizer["added_tokens_decoder"][str(number)]
        assert entry["content"] == content and entry["special"] is False


def test_shipped_held_out_prompts_are_those_of_the_corpus() -> None:
    assert json.loads((SHIPPED / "heldout.json").read_text(encoding="utf-8")) == Corpus().held_out()


def _texts() -> list[str]:
    rng = random.Random(0)
    texts = [
        "",
        " ",
        "  two  blanks ",
        "\n\n\ttab",
        "naïve Straße 東京 🦜🎉",
        "3.14 1234567890",
        "a" * 40,
        "def f(x):\n    return x",
    ]
    for conversation in islice(Corpus().train(9), 300):
        texts.append(prompt(conversation.messages()).replace(EOS, " "))
        texts.append(conversation.turns[-1].answer.assembled())
    alphabet = "abcdefghij thes  ing\n\tÄé漢字🎉0123456789.,:()[]{}'\"-_"
    texts += ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(1000)]
    return texts


def test_shipped_tokenizer_files_agree() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizers = pytest.importorskip("tokenizers")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    for text in _texts():
        ids = pieces.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids, text
        assert pieces.decode(ids) == text
        assert fast.decode(ids, skip_special_tokens=False) == text
    marked = fast.encode(f"1. Title:{FORK}{CHILD}A detail")
    assert marked.ids[0] == 1 and marked.ids.count(2048) == marked.ids.count(2049) == 1
    assert marked.tokens[-2:][0].startswith("▁")


def test_shipped_weights_fit_the_config() -> None:
    safetensors = pytest.importorskip("safetensors")
    config = json.loads((SHIPPED / "config.json").read_text())
    with safetensors.safe_open(SHIPPED / "model.safetensors", framework="np") as weights:
        rows, hidden = weights.get_slice("model.embed_tokens.weight").get_shape()
        assert weights.get_slice("model.embed_tokens.weight").get_dtype() == "F16"
        layers = {int(name.split(".")[2]) for name in weights.keys() if name.startswith("model.layers.")}  # noqa: SIM118
    assert (rows, hidden) == (config["vocab_size"], config["hidden_size"])
    assert layers == set(range(config["num_hidden_layers"]))
