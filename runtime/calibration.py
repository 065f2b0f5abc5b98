"""Texts that quantisation is calibrated with (docs/quantization.md): a file, or the one that ships, as tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apar.export import calibration as calibration_pass
from apar.export.calibration import Sample
from apar.export.errors import AparError, RequestError
from apar.export.manifest import Manifest, TokenIds
from apar.export.tokenizer_files import TokenizerFiles
from apar.runtime.chat import ChatMessage, render_chat, render_prompt
from apar.runtime.tokenizer import Tokenizer

FILE_NAME = "calibration.jsonl"
"""A checkpoint's own calibration, where it brings one."""
SHIPPED = Path(calibration_pass.__file__).parent / FILE_NAME
"""Questions and answers on many subjects, in the form that APAR's models answer."""
LONGEST = 512
"""Tokens of a sample: longer texts are cut into several, longer answers are cut off."""


class CalibrationText:
    """Calibration for `onnx_engine.build`: reads its file when the checkpoint's tokenizer is there.

    Args:
        path: plain text, one text a line; JSON lines or a JSON list of the entries below; None: `calibration.jsonl` of
            the checkpoint, or else the text that ships with the package.
        tokens: at most so many; the rest of the file is not read.

    Entries: `"a text"` or `{"text": ...}`; `{"prompt": ...}` or `{"messages": [...]}`, which go through the chat
    template, with the model's answer as `{"answer": ...}`: a text, or a list of [main text, detail] where a null or
    missing detail means that the answer does not fork there; and what `apar generate --json` prints.
    """

    def __init__(self, path: Path | None = None, tokens: int = 8192) -> None:
        self._path = path
        self._tokens = tokens
        self._entries = None if path is None else _read(path)

    @property
    def name(self) -> str:
        """What is read, for people."""
        return FILE_NAME if self._path is None else self._path.name

    def __call__(self, manifest: Manifest, files: TokenizerFiles) -> list[Sample]:
        """Samples of at most `tokens` tokens. Raises RequestError for an entry that cannot be used."""
        tokenizer = Tokenizer.of_files(files, manifest)
        longest = min(LONGEST, manifest.decoder.max_context)
        path = self._path
        if path is None:
            path = files.directory / FILE_NAME
            path = path if path.is_file() else SHIPPED
        samples: list[Sample] = []
        left = self._tokens
        for where, entry in self._entries or _read(path):
            if not left:
                break
            try:
                paths = _paths(entry, tokenizer)
            except AparError as error:
                raise RequestError(f"{path}, {where}: {error}") from error
            for sample in _samples(paths, longest):
                samples.append(sample.cut(left))
                left -= samples[-1].ids.size
        return [sample for sample in samples if sample.ids.size]


def _read(path: Path) -> list[tuple[str, Any]]:
    """Entries of a calibration file with their places, for errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the calibration cannot be read from {path}: {error}") from error
    listed = _json_list(text)
    if listed is not None:
        entries = [(f"entry {i}", item) for i, item in enumerate(listed)]
    else:
        lines = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        entries = [(where, _line(line, f"{path}, {where}")) for where, line in lines]
    if not entries:
        raise RequestError(f"{path} holds no text; give one a line, or JSON lines with `text`, `prompt` or `messages`")
    return entries


def _json_list(text: str) -> list[Any] | None:
    """The list that a file holds; None where it is none, though it may be a text that begins with a bracket."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _line(line: str, where: str) -> Any:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: no JSON object ({error.msg}); a plain text must not begin with {{") from error
    except RecursionError as error:
        raise RequestError(f"{where}: the JSON object is nested too deep") from error


def _samples(paths: list[list[int]], longest: int) -> list[Sample]:
    if len(paths) > 1:
        return [Sample.merge(paths).cut(longest)]
    return [Sample.merge([paths[0][start : start + longest]]) for start in range(0, len(paths[0]), longest)]


def _paths(entry: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the paths of one entry."""
    if isinstance(entry, str):
        return [render_prompt(entry, tokenizer)]
    if not isinstance(entry, dict):
        raise RequestError("an entry is a text, or an object with `text`, `prompt` or `messages`")
    if isinstance(entry.get("branches"), list) and isinstance(entry.get("prompt_token_ids"), list):
        return [path for path, _ in recorded_paths(entry["prompt_token_ids"], entry["branches"], tokenizer.tokens)]
    if isinstance(entry.get("text"), str):
        return [render_prompt(entry["text"], tokenizer)]
    prompt, answer = _asked(entry, tokenizer)
    return _answered_paths(prompt, answer, tokenizer)


def _asked(entry: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], Any]:
    """Token ids of the question, and the answer as it is given, or None."""
    messages: Sequence[ChatMessage]
    answer = entry.get("answer")
    given = entry.get("messages", entry.get("prompt"))
    if isinstance(given, str):
        messages = [{"role": "user", "content": given}]
    elif isinstance(given, list):
        messages = given
        last = given[-1] if given else None
        if answer is None and isinstance(last, dict) and last.get("role") == "assistant":
            messages, answer = given[:-1], last.get("content")
    else:
        raise RequestError("the object has no string `text` or `prompt` and no list `messages`")
    return render_chat(messages, tokenizer), answer


def _answered_paths(prompt: list[int], answer: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """The main path, and one for each detail."""
    if answer is None:
        return [prompt]
    segments = [[answer]] if isinstance(answer, str) else answer
    if not isinstance(segments, list) or not all(_is_segment(segment) for segment in segments):
        raise RequestError("`answer` is a text, or a list of [main text, detail]")
    tokens = tokenizer.tokens
    main, details = list(prompt), []
    for text, *rest in segments:
        main += tokenizer.encode_text(text)
        if rest and rest[0]:
            main.append(tokens.fork)
            details.append([*main, tokens.child, *tokenizer.encode_text(rest[0]), tokens.eos[0]])
    return [[*main, tokens.eos[0]], *details]


def _is_segment(segment: Any) -> bool:
    if not isinstance(segment, list) or not 1 <= len(segment) <= 2 or not isinstance(segment[0], str):
        return False
    return len(segment) == 1 or segment[1] is None or isinstance(segment[1], str)


def recorded_paths(prompt: Any, branches: Sequence[Any], tokens: TokenIds) -> list[tuple[list[int], int]]:
    """Every branch's path in an answer of `apar generate --json`, and where its own tokens begin on it.

    Raises RequestError where this is no such answer.
    """
    paths: list[tuple[list[int], int]] = []
    try:
        for branch in branches:
            own = [int(token) for token in branch["token_ids"]]
            if branch["finish_reason"] == "stop":
                own.append(tokens.eos[0])
            begin = [int(token) for token in prompt]
            if branch["parent_id"] is not None:
                parent = branches[branch["parent_id"]]
                nth = parent["children"].index(branch["branch_id"])
                path, first = paths[branch["parent_id"]]
                forks = [i for i in range(first, len(path)) if path[i] == tokens.fork]
                begin = [*path[: forks[nth] + 1], tokens.child]
            paths.append(([*begin, *own], len(begin)))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RequestError(f"this is no answer of this checkpoint's `apar generate --json` ({error!r})") from error
    return paths
