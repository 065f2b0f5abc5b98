"""Recorded trees: how many tokens the pieces of answers had. From a file of such trees, or from answers themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apar.export.errors import ExecutorError

Tree = Mapping[str, Any]
"""`{"prompt_tokens": int, "segments": [[main_tokens, detail_tokens], ...]}` in reading order; detail 0: no fork."""


def load_trees(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of trees, or what `apar generate --json` printed.

    Answers that failed are left out. Raises ExecutorError if the file cannot be read or holds neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except ValueError as error:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(_is_answer(item) for item in found):
                raise ValueError(error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExecutorError(f"recorded trees cannot be read from {path}: {error}") from error
    items = [found] if _is_answer(found) else found
    if not isinstance(items, list):
        raise ExecutorError(f"{path} holds no list of trees")
    try:
        return [_tree(item) if _is_answer(item) else item for item in items if not _failed(item)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ExecutorError(f"{path} holds answers that `apar generate --json` does not print: {error!r}") from error


def text_tokens(tree: Tree) -> int:
    """Text tokens of a recorded answer: main and detail tokens, without [Fork], [Child] and EOS."""
    return sum(main + detail for main, detail in tree["segments"])


def _is_answer(item: object) -> bool:
    return isinstance(item, dict) and "branches" in item


def _failed(item: object) -> bool:
    return isinstance(item, dict) and item.get("error") is not None


def _tree(answer: dict[str, Any]) -> dict[str, Any]:
    """The tree of an answer. A segment has at least one token, since the script of a replay does."""
    branches = {branch["branch_id"]: branch for branch in answer["branches"]}
    root = branches[0]
    details = []
    for child in root["children"]:
        if branches[child]["children"]:
            raise ExecutorError(
                f"the answer {answer['request_id']} has branches of depth 3, and recorded trees have two levels; "
                "generate with --max-depth 2"
            )
        details.append(sum(branches[child]["segment_tokens"]))
    mains = [max(1, count) for count in root["segment_tokens"]]
    if not root["segment_tokens"][-1] and len(mains) > 1:
        mains.pop()
    segments = [[main, details[i] if i < len(details) else 0] for i, main in enumerate(mains)]
    return {"prompt_tokens": len(answer["prompt_token_ids"]), "segments": segments}
