"""Calibration text: every form of file, and what is wrong with a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apar.export.calibration import Sample
from apar.export.errors import RequestError
from apar.export.manifest import Manifest
from apar.export.tokenizer_files import read_tokenizer
from apar.runtime.calibration import LONGEST, SHIPPED, CalibrationText
from apar.runtime.chat import render_chat
from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.tokenizer import Tokenizer

Read = Callable[..., list[Sample]]


@pytest.fixture(scope="module")
def tokenizer(tiny_engine: Path) -> Tokenizer:
    return Tokenizer.load(tiny_engine)


@pytest.fixture
def read(tiny_directory: Path, tiny_engine: Path, tmp_path: Path) -> Read:
    """Samples of a file with this content."""

    def samples(content: str, **options: Any) -> list[Sample]:
        path = tmp_path / "calibration.txt"
        path.write_text(content, encoding="utf-8")
        return CalibrationText(path, **options)(Manifest.load(tiny_engine), read_tokenizer(tiny_directory))

    return samples


def paths(sample: Sample) -> list[list[int]]:
    """Every path from the root to a leaf, in order of their leaves."""
    leaves = [n for n in range(sample.ids.size) if not sample.visible[n + 1 :, n].any()]
    return [sample.ids[sample.visible[leaf]].tolist() for leaf in leaves]


def question(tokenizer: Tokenizer, text: str) -> list[int]:
    return render_chat([{"role": "user", "content": text}], tokenizer)


def test_a_line_is_a_text(read: Read, tokenizer: Tokenizer) -> None:
    found = read("Owls live in old barns.\n\n  Tennis is played with a racket. \n")
    bos = tokenizer.tokens.bos
    texts = ["Owls live in old barns.", "Tennis is played with a racket."]
    assert [sample.ids.tolist() for sample in found] == [[bos, *tokenizer.encode_text(text)] for text in texts]
    assert all(np.array_equal(sample.visible, np.tri(sample.ids.size, dtype=bool)) for sample in found)
    same = [json.dumps(texts), "\n".join(json.dumps({"text": text}) for text in texts)]
    for content in same:
        assert [sample.ids.tolist() for sample in read(content)] == [sample.ids.tolist() for sample in found]


def test_a_text_may_begin_with_a_bracket(read: Read) -> None:
    assert len(read("[1] Owls live in barns.\n[2] They hunt at night.\n")) == 2


def test_questions_and_answers(read: Read, tokenizer: Tokenizer) -> None:
    tokens, asked = tokenizer.tokens, question(tokenizer, "Where do owls live?")
    text = tokenizer.encode_text("In barns.")
    for entry in (
        {"prompt": "Where do owls live?", "answer": "In barns."},
        {"messages": [{"role": "user", "content": "Where do owls live?"}], "answer": "In barns."},
        {
            "messages": [
                {"role": "user", "content": "Where do owls live?"},
                {"role": "assistant", "content": "In barns."},
            ]
        },
    ):
        (sample,) = read(json.dumps(entry))
        assert paths(sample) == [[*asked, *text, tokens.eos[0]]]
    (sample,) = read('{"prompt": "Where do owls live?"}')
    assert paths(sample) == [asked]


def test_an_answer_that_forks(read: Read, tokenizer: Tokenizer) -> None:
    tokens, asked = tokenizer.tokens, question(tokenizer, "Owls?")
    entry = {"prompt": "Owls?", "answer": [["1. Food:", "Mice."], ["2. Home:", "Barns."], ["The end.", None], ["!"]]}
    (sample,) = read(json.dumps(entry))
    one, two, three, four = (tokenizer.encode_text(t) for t in ("1. Food:", "2. Home:", "The end.", "!"))
    mice, barns = tokenizer.encode_text("Mice."), tokenizer.encode_text("Barns.")
    main = [*asked, *one, tokens.fork, *two, tokens.fork]
    assert sorted(paths(sample)) == sorted(
        [
            [*main, *three, *four, tokens.eos[0]],
            [*asked, *one, tokens.fork, tokens.child, *mice, tokens.eos[0]],
            [*main, tokens.child, *barns, tokens.eos[0]],
        ]
    )
    assert sample.ids.size == len(main) + len(three) + len(four) + 1 + len(mice) + len(barns) + 4


def test_control_strings_in_texts_stay_text(read: Read, tokenizer: Tokenizer) -> None:
    (sample,) = read('{"prompt": "Owls?", "answer": [["a [SplitMask] b </s>"]]}')
    assert tokenizer.tokens.fork not in sample.ids
    assert sample.ids.tolist().count(tokenizer.tokens.eos[0]) == 1


def test_the_models_own_answers(read: Read, tiny_engine: Path, tokenizer: Tokenizer) -> None:
    from apar.runtime.cli.answer_output import result_json
    from apar.runtime.cli.prompts import PromptEntry

    with LLM(tiny_engine) as llm:
        answer = llm.generate("Give me four facts about owls.", SamplingParams(max_tokens=300))[0]
    assert len(answer.branches) > 2
    (sample,) = read(json.dumps(result_json(PromptEntry("Give me four facts about owls."), answer)))
    prompt = answer.prompt_token_ids
    ends = [[tokenizer.tokens.eos[0]] if branch.finish_reason == "stop" else [] for branch in answer.branches]
    assert all(ends)
    found = paths(sample)
    assert [*prompt, *answer.branches[0].token_ids, *ends[0]] in found
    assert len(found) == len(answer.branches)
    for branch, end in zip(answer.branches, ends, strict=True):
        assert any(path[-len(branch.token_ids) - 1 :] == branch.token_ids + end for path in found)
    size = sum(len(branch.token_ids) + 1 + (branch.parent_id is not None) for branch in answer.branches)
    assert sample.ids.size == len(prompt) + size


def test_limits(read: Read) -> None:
    long = "Owls live in old barns. " * 200
    found = read(long)
    sizes = [sample.ids.size for sample in found]
    assert len(sizes) > 2 and set(sizes[:-1]) == {LONGEST} and sizes[-1] <= LONGEST
    assert np.concatenate([sample.ids for sample in found]).size == sum(sizes)
    for limit in (1, 100, LONGEST + 1):
        assert sum(sample.ids.size for sample in read(long, tokens=limit)) == limit
    entry = {"prompt": "Owls?", "answer": [["Food: " * 90, "Mice. " * 90], ["Home:", "Barns."]] * 3}
    (sample,) = read(json.dumps(entry))
    assert sample.ids.size == LONGEST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text; give one a line"),
        (" \n\n", "holds no text"),
        ("[]", "holds no text"),
        ('{"prompt": ', "line 1: no JSON object"),
        ('ok\n{"question": "x"}', "line 2: the object has no string `text` or `prompt` and no list `messages`"),
        ("[3]", "entry 0: an entry is a text, or an object"),
        ('{"text": 3}', "line 1: the object has no string `text`"),
        ('{"messages": []}', "line 1: messages is empty"),
        ('{"messages": [{"role": "user"}]}', "line 1: message 0 must be an object with role and content"),
        ('{"prompt": "x", "answer": 3}', r"`answer` is a text, or a list of \[main text, detail\]"),
        ('{"prompt": "x", "answer": [["a", "b", "c"]]}', "`answer` is a text, or a list"),
        ('{"prompt": "x", "answer": [[null]]}', "`answer` is a text, or a list"),
        ('{"prompt": "x", "answer": [["a", 3]]}', "`answer` is a text, or a list"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"prompt_token_ids": [1], "branches": [{"token_ids": [5]}]}', "no answer of this checkpoint's"),
        ('{"prompt_token_ids": ["a"], "branches": [{"token_ids": [], "parent_id": null}]}', "no answer of this"),
    ],
)
def test_bad_files(read: Read, content: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(content)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="calibration cannot be read from"):
        CalibrationText(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="calibration cannot be read from"):
        CalibrationText(tmp_path / "binary")
    with pytest.raises(RequestError, match="calibration cannot be read from"):
        CalibrationText(tmp_path)


def test_what_is_calibrated_with_by_default(tiny_directory: Path, tiny_engine: Path, tokenizer: Tokenizer) -> None:
    """The checkpoint's own file; the shipped one has answers that fork too."""
    manifest, files = Manifest.load(tiny_engine), read_tokenizer(tiny_directory)
    own = CalibrationText()(manifest, files)
    shipped = CalibrationText(SHIPPED)(manifest, files)
    assert own[0].ids.tolist() == CalibrationText(tiny_directory / "calibration.jsonl")(manifest, files)[0].ids.tolist()
    for samples in (own, shipped):
        tokens = np.concatenate([sample.ids for sample in samples])
        assert tokens.size > 3000
        assert np.count_nonzero(tokens == tokenizer.tokens.child) > 20


def test_calibration_and_evaluation_are_apart(tiny_directory: Path, heldout: list[dict[str, Any]]) -> None:
    lines = (tiny_directory / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {json.dumps(json.loads(line)["messages"]) for line in lines}
    assert len(asked) == len(lines) == 40
    assert not asked & {json.dumps(entry["messages"]) for entry in heldout}
