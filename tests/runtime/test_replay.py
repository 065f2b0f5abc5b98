"""The replay executor: recorded answers come out whole, and wrong K/V books do not go unnoticed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_builder import Books, Branch, Row, Step

from apar.export.errors import ExecutorError
from apar.runtime.executor.recorded_trees import load_trees, text_tokens
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.executor.replay_script import CHILD, EOS, FORK, TEXT

TREES = [
    {"prompt_tokens": 21, "segments": [[5, 9], [3, 0], [4, 17], [1, 1]]},
    {"prompt_tokens": 9, "segments": [[12, 0]]},
    {"prompt_tokens": 40, "segments": [[2, 3], [2, 30]]},
    {"prompt_tokens": 7, "segments": [[1, 2], [1, 0]]},
]
BLOCKS, SIZE = 256, 4


def make(trees: list[dict] = TREES, **options: object) -> ReplayExecutor:
    settings = {"num_blocks": BLOCKS, "block_size": SIZE, "verify_paths": True} | options
    return ReplayExecutor(trees, **settings)  # type: ignore[arg-type]


class Decoder:
    """Greedy decoding of requests in one batch, with forks as the runtime makes them."""

    def __init__(self, executor: ReplayExecutor, ban: Callable[[int], bool] = lambda step: False) -> None:
        self.executor = executor
        self.books = Books(BLOCKS, executor.manifest.block_size, seed=1)
        self.ban = ban
        self.steps = 0
        self.running: list[Branch] = []
        self.owner: dict[Branch, int] = {}
        self.sampled: dict[int, list[int]] = {}

    def add(self, tree: int, salt: int = 0) -> int:
        request = len(self.sampled)
        branch = self.books.add(self.executor.replay_prompt(tree, salt))
        self.running.append(branch)
        self.owner[branch] = request
        self.sampled[request] = []
        return request

    def step(self, chunk: int = 1000, change: Callable[[Step], None] = lambda step: None) -> None:
        rows = [Row(branch, min(chunk, len(branch.tokens) - branch.done)) for branch in self.running]
        rows.sort(key=lambda row: row.branch.blocks[:1])
        step = self.books.step(rows, wanted="last")
        change(step)
        logits = self.executor.execute(step.inputs).copy()
        if self.ban(self.steps):
            logits[:, FORK] = -np.inf
        self.steps += 1
        for row, token in zip(rows, logits.argmax(1).tolist(), strict=True):
            branch = row.branch
            if branch.done < len(branch.tokens):
                continue
            request = self.owner[branch]
            self.sampled[request].append(token)
            if token == EOS:
                self.running.remove(branch)
                self.books.release(branch)
                continue
            branch.tokens.append(token)
            if token == FORK:
                child = self.books.fork(branch, [CHILD])
                self.owner[child] = request
                self.running.append(child)

    def finish(self, chunk: int = 1000) -> None:
        while self.running:
            self.step(chunk)


def check_answer(sampled: list[int], tree: dict, forks: int) -> None:
    assert sum(token >= TEXT for token in sampled) == text_tokens(tree)
    assert sampled.count(FORK) == forks
    assert sampled.count(EOS) == forks + 1
    assert len(sampled) == text_tokens(tree) + 2 * forks + 1


def details(tree: dict) -> int:
    return sum(detail > 0 for _, detail in tree["segments"])


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("chunk", [1000, 3])
def test_answers_come_out_whole(size: int, chunk: int) -> None:
    decoder = Decoder(make(block_size=size))
    for tree in (0, 1, 2, 3, 0):
        decoder.add(tree, salt=len(decoder.sampled))
    decoder.finish(chunk)
    for request, tree in enumerate((0, 1, 2, 3, 0)):
        check_answer(decoder.sampled[request], TREES[tree], details(TREES[tree]))
    assert sum(decoder.books.references) == 0


def test_one_step_decodes_a_token_of_every_branch() -> None:
    decoder = Decoder(make())
    decoder.add(2)
    decoder.finish()
    # main: 2 text, [Fork], 2 text, [Fork]; then the second detail's 30 tokens and its EOS.
    assert decoder.steps == 2 + 1 + 2 + 1 + 30 + 1


@pytest.mark.parametrize("tree", range(len(TREES)))
def test_banned_forks_put_the_detail_inline(tree: int) -> None:
    decoder = Decoder(make(), ban=lambda step: True)
    decoder.add(tree)
    decoder.finish()
    check_answer(decoder.sampled[0], TREES[tree], 0)


@pytest.mark.parametrize("period", [2, 3, 5])
def test_forks_banned_now_and_then(period: int) -> None:
    decoder = Decoder(make(), ban=lambda step: step % period == 0)
    decoder.add(0)
    decoder.add(2, salt=5)
    decoder.finish()
    for request, tree in ((0, TREES[0]), (1, TREES[2])):
        check_answer(decoder.sampled[request], tree, decoder.sampled[request].count(FORK))


def test_preempted_branches_are_computed_again() -> None:
    decoder = Decoder(make())
    decoder.add(0)
    for _ in range(12):
        decoder.step()
    assert len(decoder.running) > 1
    decoder.books.copies.clear()
    for branch in decoder.running:
        decoder.books.release(branch)
        branch.done = 0
    decoder.finish(chunk=7)
    check_answer(decoder.sampled[0], TREES[0], 3)


def test_prompts_have_their_length_and_differ_by_salt() -> None:
    executor = make()
    for index, tree in enumerate(TREES):
        prompts = [executor.replay_prompt(index, salt) for salt in (0, 1, 2)]
        assert {len(prompt) for prompt in prompts} == {tree["prompt_tokens"]}
        assert len({tuple(prompt) for prompt in prompts}) == 3
    with pytest.raises(ExecutorError, match="no recorded tree 4"):
        executor.replay_prompt(4)


def run_until_forked(executor: ReplayExecutor) -> Decoder:
    decoder = Decoder(executor)
    decoder.add(0)
    decoder.add(2, salt=1)
    while len(decoder.running) < 5:
        decoder.step()
    return decoder


def test_two_rows_with_swapped_tables_are_detected() -> None:
    decoder = run_until_forked(make(verify_paths=False))

    def swap(step: Step) -> None:
        table = step.inputs.block_table
        table[[0, -1]] = table[[-1, 0]]

    with pytest.raises(ExecutorError, match="row"):
        decoder.step(change=swap)


def test_a_wrong_block_inside_the_path_is_detected() -> None:
    decoder = run_until_forked(make())

    def corrupt(step: Step) -> None:
        step.inputs.block_table[0, 1] = step.inputs.block_table[0, 2]

    with pytest.raises(ExecutorError, match="does not hold path index"):
        decoder.step(change=corrupt)


def test_a_forgotten_copy_is_detected() -> None:
    decoder = Decoder(make(verify_paths=False))
    decoder.add(0)

    def forget(step: Step) -> None:
        step.inputs.slot_copies = step.inputs.slot_copies[:0]

    with pytest.raises(ExecutorError, match="should hold path index"):
        for _ in range(40):
            decoder.step(change=forget)


def test_a_write_into_a_shared_block_is_detected() -> None:
    decoder = run_until_forked(make())
    first, other = decoder.running[0], decoder.running[-1]
    branch = decoder.books.add(decoder.executor.replay_prompt(3))
    branch.blocks = [other.blocks[0]]
    decoder.books.references[other.blocks[0]] += 1
    decoder.running.append(branch)
    decoder.owner[branch] = decoder.owner[first]
    with pytest.raises(ExecutorError, match="does not hold path index"):
        decoder.step()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("position_ids", lambda a: a + 1, "position_ids"),
        ("slot_mapping", lambda a: a[::-1].copy(), "slot_mapping|same slot"),
        ("input_ids", lambda a: np.full_like(a, EOS), "no recorded tree"),
        ("slot_copies", lambda a: np.array([[0, 10**6]], np.int32), "outside"),
        ("slot_copies", lambda a: np.array([[0, 8], [1, 8]], np.int32), "twice"),
        ("kv_len", lambda a: a + 40, "narrower|no block|slot_mapping"),
    ],
)
def test_steps_against_the_contract_are_refused(name: str, change: Callable, message: str) -> None:
    decoder = run_until_forked(make())

    def corrupt(step: Step) -> None:
        setattr(step.inputs, name, change(getattr(step.inputs, name)))

    with pytest.raises(ExecutorError, match=message):
        decoder.step(change=corrupt)


def test_foreign_prompt_is_refused() -> None:
    executor, books = make(), Books(BLOCKS, SIZE)
    step = books.step([Row(books.add([1, 9, 9, 9, 9, 9]), 6)])
    with pytest.raises(ExecutorError, match="replay_prompt"):
        executor.execute(step.inputs)


def test_drafts_are_followed_under_a_tree_mask() -> None:
    executor, books = make(), Books(BLOCKS, SIZE)
    branch = books.add(executor.replay_prompt(1))
    truth: list[int] = []
    probe = Decoder(make())
    probe.add(1)
    probe.finish()
    truth = probe.sampled[0]
    executor.execute(books.step([Row(branch, 9)], wanted="last").inputs)
    branch.tokens.append(truth[0])
    wrong = TEXT + (truth[1] - TEXT + 1) % 59
    # nodes: right, wrong, right after right, right after wrong, right after right after right
    row = Row(branch, 1, [truth[1], wrong, truth[2], truth[2], truth[3]], [-1, -1, 0, 1, 2])
    step = books.step([row], wanted="all")
    logits = executor.execute(step.inputs)
    offset = {int(token): logits[place].argmax() for place, token in enumerate(step.inputs.logits_rows)}
    assert [offset[i] for i in (0, 1, 3, 5)] == [truth[1], truth[2], truth[3], truth[4]]
    branch.tokens += truth[1:5]
    books.accept(branch, 9 + 1 + 4)
    decode = books.step([Row(branch, 1)], wanted="last")
    assert decode.inputs.slot_copies.size
    assert executor.execute(decode.inputs)[0].argmax() == truth[5]


def test_a_mask_that_is_no_path_is_refused() -> None:
    executor, books = make(), Books(BLOCKS, SIZE)
    branch = books.add(executor.replay_prompt(1))
    step = books.step([Row(branch, 9, [7, 8], [-1, 0])])
    step.inputs.tree_mask[-1] &= ~1
    with pytest.raises(ExecutorError, match="tree_mask"):
        executor.execute(step.inputs)


def test_a_row_may_go_on_from_what_another_row_writes_in_the_step() -> None:
    executor, books = make(), Books(BLOCKS, SIZE)
    prompt = executor.replay_prompt(0)
    first, second = books.add(prompt), books.add(prompt)
    step = books.step([Row(first, 20)])
    second.done, second.blocks = 20, list(first.blocks)
    merged = books.step([Row(second, 1)])
    inputs = dataclasses.replace(
        step.inputs,
        **{
            name: np.concatenate([getattr(merged.inputs, name), getattr(step.inputs, name)])
            for name in ("input_ids", "position_ids", "kv_len", "slot_mapping")
        },
        query_start=np.array([0, 1, 21], np.int32),
        block_table=np.array([[*second.blocks], [*first.blocks, -1]], np.int32),
        tree_mask=np.zeros((21, 0), np.int32),
        prefix_rows=np.zeros(1, np.int32),
        prefix_blocks=np.zeros(0, np.int32),
        logits_rows=np.array([0], np.int32),
    )
    assert executor.execute(inputs)[0].argmax() >= TEXT


def test_padding_rows_are_ignored_and_an_empty_selection_is_fine() -> None:
    executor, books = make(), Books(BLOCKS, SIZE)
    branch = books.add(executor.replay_prompt(3))
    step = books.step([Row(branch, 7)], padding=3)
    step.inputs.logits_rows = np.zeros(0, np.int32)
    assert executor.execute(step.inputs).shape == (0, executor.manifest.decoder.vocab_size)


def test_many_rows_grow_the_logits() -> None:
    executor, books = make(num_blocks=2000), Books(2000, SIZE)
    rows = [Row(books.add(executor.replay_prompt(1, salt)), 9) for salt in range(150)]
    logits = executor.execute(books.step(rows, wanted="last").inputs)
    assert logits.shape[0] == 150
    assert (logits.argmax(1) == logits[0].argmax()).all()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"segments": [[1, 0]]}, "prompt_tokens"),
        ({"prompt_tokens": 2, "segments": [[1, 0]]}, "at least 3"),
        ({"prompt_tokens": 9, "segments": []}, "main_tokens"),
        ({"prompt_tokens": 9, "segments": [[0, 4]]}, "main_tokens"),
    ],
)
def test_malformed_trees_are_refused(tree: dict, message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        make([tree])


def test_options_and_closing() -> None:
    for options in ({"num_blocks": 0}, {"vocab_size": 7}):
        with pytest.raises(ExecutorError):
            make(**options)
    with pytest.raises(ExecutorError, match="at least one"):
        make([])
    executor, books = make(step_seconds=0.02), Books(BLOCKS, SIZE)
    step = books.step([Row(books.add(executor.replay_prompt(1)), 9)])
    executor.execute(step.inputs)
    executor.close()
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.execute(step.inputs)


def test_trees_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trees.json"
    path.write_text(json.dumps(TREES), encoding="utf-8")
    assert load_trees(path) == TREES
    for content in ("{", "{}"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ExecutorError):
            load_trees(path)
    with pytest.raises(ExecutorError):
        load_trees(tmp_path / "none.json")


def branch(branch_id: int, segment_tokens: list[int], *children: int) -> dict[str, Any]:
    return {"branch_id": branch_id, "segment_tokens": segment_tokens, "children": list(children)}


def answer(*branches: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    return {"request_id": "a", "prompt_token_ids": [1] * 9, "branches": list(branches), "error": error}


def test_answers_are_trees_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = [
        answer(branch(0, [5, 3, 0], 1, 2), branch(1, [8]), branch(2, [0])),
        answer(branch(0, [7])),
        answer(branch(0, [7]), error="a step failed"),
        answer(branch(0, [0, 4], 1), branch(1, [6])),
        answer(branch(0, [0])),
    ]
    segments = [[[5, 8], [3, 0]], [[7, 0]], [[1, 6], [4, 0]], [[1, 0]]]
    expected = [{"prompt_tokens": 9, "segments": found} for found in segments]
    for content in ("\n".join(json.dumps(item) for item in answers) + "\n", json.dumps(answers)):
        path.write_text(content, encoding="utf-8")
        assert load_trees(path) == expected
    path.write_text(json.dumps(answers[1]), encoding="utf-8")
    assert load_trees(path) == [expected[1]]
    deep = answer(branch(0, [5, 3], 1), branch(1, [8, 1], 2), branch(2, [1]))
    for content, message in (
        (json.dumps(deep), r"branches of depth 3.*--max-depth 2"),
        (json.dumps({"branches": [{}]}), r"does not print: KeyError"),
        (json.dumps(answers[0]) + "\n{}\n", "Extra data"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ExecutorError, match=message):
            load_trees(path)
