"""A conversation, or a plain text, to the token ids of a prompt.

Only a template itself can write control tokens: what people typed stays text (docs/decoding.md, "Prompt").
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NoReturn, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apar.export.errors import RequestError
from apar.runtime.tokenizer import Tokenizer, check_text

DEFAULT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System prompt of vicuna_v1.1 (FastChat, conversation.py)."""


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def render_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text to be continued: beginning of sequence, then the text, with no template around it."""
    ids = tokenizer.encode_text(text)
    return ids if tokenizer.tokens.bos is None else [tokenizer.tokens.bos, *ids]


def render_chat(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    `messages`: at most one system message in front, then the user's and the assistant's, a user's last; several of one
    role in a row are one turn, with an empty line between them. The checkpoint's chat template is used where it has
    one, vicuna_v1.1 otherwise. Raises RequestError where the conversation has another form or the template refuses it,
    CapacityError where it is too long.
    """
    _check(messages)
    if tokenizer.max_chars is not None:
        tokenizer.check_length(sum(len(message["content"]) for message in messages))
    turns = _turns(messages)
    if tokenizer.chat_template is None:
        return tokenizer.encode_segments(_vicuna(turns, tokenizer))
    return _render_template(turns, tokenizer, tokenizer.chat_template)


def _check(messages: Any) -> None:
    """Refuse what is no conversation; `messages` may come from JSON and hold anything."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError("messages must be a list of {role, content} objects")
    if not messages:
        raise RequestError("messages is empty; give at least one user message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RequestError(f"message {index} must be an object with role and content")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise RequestError(f"message {index} has the role {role!r}; roles are system, user and assistant")
        if not isinstance(content, str):
            raise RequestError(f"the content of message {index} must be a string, not {type(content).__name__}")
        check_text(content)
        if role == "system" and index > 0:
            raise RequestError(f"message {index} is a system message; give at most one, in front of all others")
    if messages[-1]["role"] != "user":
        raise RequestError("the last message must be the user's; an answer that was begun cannot be continued here")


def _turns(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Messages with those of one role in a row put together: models and templates know users and assistants in turn,
    and a client whose answer was stopped before it began sends two questions in a row."""
    rows = groupby(messages, key=lambda message: message["role"])
    return [{"role": role, "content": "\n\n".join(message["content"] for message in row)} for role, row in rows]


def _vicuna(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[str | int]:
    """vicuna_v1.1: `{system} USER: {q1} ASSISTANT: {a1}</s>USER: {q2} ASSISTANT:`, beginning of sequence in front.

    An assistant's greeting in front of the first question has its `ASSISTANT:`, too.
    """
    segments: list[str | int] = [] if tokenizer.tokens.bos is None else [tokenizer.tokens.bos]
    system = DEFAULT_SYSTEM
    turns = list(messages)
    if turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    if system:
        segments.append(f"{system} ")
    if turns[0]["role"] == "assistant":
        segments.append("ASSISTANT:")
    for turn in turns:
        if turn["role"] == "user":
            segments.append(f"USER: {turn['content']} ASSISTANT:")
        else:
            segments += [f" {turn['content']}", tokenizer.tokens.eos[0]]
    return segments


class _Shield:
    """Keeps what people typed apart from what a template writes, through the rendering.

    Added-token strings inside a message become placeholders that no message contains. Where a message begins or
    ends with part of such a string, a placeholder for nothing stands at that edge, so that a template which puts
    two messages side by side cannot complete one either. Everything else reaches the template unchanged.
    """

    def __init__(self, strings: Sequence[str], contents: Sequence[str]) -> None:
        self._strings = strings
        self._pattern = re.compile("|".join(re.escape(s) for s in strings)) if strings else None
        self._heads = {s[:n] for s in strings for n in range(1, len(s))}
        self._tails = {s[n:] for s in strings for n in range(1, len(s))}
        self._longest = max(map(len, strings), default=0)
        self._nonce = _nonce()
        while any(self._nonce in content for content in contents):
            self._nonce = _nonce()
        self._signs = {sign for sign in "\ue000\ue001\ue002" if not any(sign in content for content in contents)}
        self._edge = f"\ue000{self._nonce}\ue001"
        self._typed: list[str] = []
        self._placeholder = re.compile(f"\ue000{self._nonce}(?:\ue002([0-9]+))?\ue001")

    def cover(self, content: str) -> str:
        """A message's content as the template is to see it."""
        if self._pattern is not None:
            content = self._pattern.sub(self._hide, content)
        inner = content.strip()
        left, right = content.partition(inner)[::2] if inner else (content, "")
        sizes = range(1, min(self._longest, len(inner) + 1))
        whole = any(inner in s for s in self._strings)
        if inner and (whole or any(inner[:n] in self._tails for n in sizes)):
            left += self._edge
        if inner and (whole or any(inner[-n:] in self._heads for n in sizes)):
            right = self._edge + right
        return f"{left}{inner}{right}"

    def uncover(self, text: str) -> str:
        """Rendered text with everything that was typed back in place."""
        text = self._placeholder.sub(lambda m: self._typed[int(m[1])] if m[1] else "", text)
        if self._nonce in text or any(sign in text for sign in self._signs):
            raise RequestError("the checkpoint's chat template alters message texts so that they cannot be kept apart")
        return text

    def _hide(self, match: re.Match[str]) -> str:
        self._typed.append(match[0])
        return f"\ue000{self._nonce}\ue002{len(self._typed) - 1}\ue001"


def _nonce() -> str:
    return f"{secrets.randbelow(10**24):024d}"


def _render_template(messages: Sequence[ChatMessage], tokenizer: Tokenizer, source: str) -> list[int]:
    added = [token for token in tokenizer.added_tokens if token.text.strip()]
    ids = {token.text: token for token in added}
    strings = sorted(ids, key=len, reverse=True)
    shield = _Shield(strings, [message["content"] for message in messages])
    covered = [{"role": m["role"], "content": shield.cover(m["content"])} for m in messages]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: value for name in names if (value := tokenizer.special_string(name)) is not None}
    try:
        text = _compile(source).render(
            messages=covered, add_generation_prompt=True, tools=None, documents=None, **special
        )
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the checkpoint's chat template is broken: {error.message} (its line {error.lineno}); "
            "correct it and build the engine again"
        ) from error
    except Exception as error:  # a template can fail in any way that Python can
        raise RequestError(f"the checkpoint's chat template refuses this conversation: {error}") from error

    segments: list[str | int] = []
    pattern = re.compile("(" + "|".join(re.escape(s) for s in strings) + ")") if strings else None
    strip_next = False
    for index, piece in enumerate(pattern.split(text) if pattern else [text]):
        if index % 2:
            token = ids[piece]
            if token.strips_left and segments and isinstance(segments[-1], str):
                segments[-1] = segments[-1].rstrip()
            segments.append(token.token_id)
            strip_next = token.strips_right
        else:
            segments.append(shield.uncover(piece.lstrip() if strip_next else piece))
    return tokenizer.encode_segments(segments)


class _Generation(Extension):
    """`{% generation %}` marks training targets; in a prompt it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that jinja2 reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A checkpoint's template in the environment that Hugging Face's tokenizers give it, sandboxed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[[str], Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With the arguments that templates may give it, in the order of Hugging Face's."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
