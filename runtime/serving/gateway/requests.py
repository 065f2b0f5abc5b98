"""OpenAI's chat and completions requests, checked, as one job for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apar.runtime.serving.gateway.parameters import (
    Common,
    alternatives,
    flag,
    invalid,
    read_common,
    refuse_unsupported,
    unsupported,
)
from apar.runtime.serving.gateway.settings import GatewaySettings

COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions where a request names none: OpenAI's default."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SEED_SPACE = 2**64

_CHAT_ONLY = {
    "tools": "this model calls no tools",
    "functions": "this model calls no functions",
    "audio": "this model gives text only",
    "web_search_options": "this model does not search the web",
}
_COMPLETIONS_ONLY = {"suffix": "text cannot be inserted before an end; give a prompt alone"}


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's work: `inputs` of the model for every choice of the answer, in order."""

    chat: bool
    common: Common
    inputs: list[dict[str, Any]]
    logprobs: int | None
    """Alternatives a token that the client wants to see; None: no log-probabilities."""
    echo: bool = False
    """Whether each answer begins with its prompt, a text."""

    @property
    def prompts(self) -> int:
        """Different prompts; each has `common.choices` answers."""
        return len(self.inputs) // self.common.choices


def chat_job(body: Mapping[str, Any], settings: GatewaySettings) -> Job:
    """A /v1/chat/completions request. Raises ApiError."""
    common = read_common(body, True, settings.model_name, settings.max_context, settings.deadline)
    refuse_unsupported(body, _CHAT_ONLY)
    for name in ("tool_choice", "function_call"):
        if body.get(name) not in (None, "none", "auto"):
            raise unsupported(name, f"{name} demands a call, and this model calls no tools")
    _check_format(body)
    wanted = flag(body, "logprobs")
    top = alternatives(body, "top_logprobs")
    if top is not None and not wanted:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    prompt = {"messages": json.dumps(_messages(body.get("messages")), ensure_ascii=False)}
    return _job(True, common, [prompt], (top or 0) if wanted else None, settings)


def completions_job(body: Mapping[str, Any], settings: GatewaySettings) -> Job:
    """A /v1/completions request. Raises ApiError."""
    common = read_common(body, False, settings.model_name, COMPLETION_TOKENS, settings.deadline)
    refuse_unsupported(body, _COMPLETIONS_ONLY)
    top = alternatives(body, "logprobs")
    echo = flag(body, "echo")
    if echo and top is not None:
        raise unsupported("echo", "echo cannot be combined with logprobs: prompts have no log-probabilities")
    best_of = body.get("best_of")
    if best_of not in (None, common.choices):
        raise unsupported("best_of", "best_of is not supported; ask for n answers and choose")
    prompts = [prompt | {"chat": False} for prompt in _prompts(body.get("prompt"))]
    if echo and any("text_input" not in prompt for prompt in prompts):
        raise unsupported("echo", "echo needs prompts that are texts, not token ids")
    return _job(False, common, prompts, top, settings, echo)


def _job(
    chat: bool,
    common: Common,
    prompts: Sequence[dict[str, Any]],
    logprobs: int | None,
    settings: GatewaySettings,
    echo: bool = False,
) -> Job:
    count = len(prompts) * common.choices
    if count > settings.max_choices:
        raise invalid(
            "n", f"the request asks for {count} answers (prompts times n), at most {settings.max_choices} are allowed"
        )
    extra: dict[str, Any] = {}
    if logprobs is not None:
        extra["logprobs"] = logprobs
    if common.branch_events or logprobs is not None:
        extra["branch_events"] = True
    inputs = []
    for prompt in prompts:
        for number in range(common.choices):
            one = common.inputs | extra | prompt
            if common.seed is not None:
                one["seed"] = (common.seed + number) % _SEED_SPACE
            inputs.append(one)
    return Job(chat, common, inputs, logprobs, echo)


def _messages(messages: Any) -> list[dict[str, str]]:
    """Messages with roles and texts as the model takes them; their order is the model's to check."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "messages must be a list of at least one {role, content} object")
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise invalid(where, f"{where} must be an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(
                f"{where}.role", f"{where}.role must be system, developer, user or assistant, not {str(role)[:40]!r}"
            )
        if message.get("tool_calls") or message.get("function_call"):
            raise unsupported(f"{where}.tool_calls", "this model calls no tools")
        found.append({"role": _ROLES[role], "content": _content(message.get("content"), f"{where}.content")})
    return found


def _content(content: Any, where: str) -> str:
    """A message's text: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{where} must be a string or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise invalid(where, f'{where} may hold parts {{"type": "text", "text": ...}} only: this model reads text')
        texts.append(part["text"])
    return "".join(texts)


def _prompts(prompt: Any) -> list[dict[str, Any]]:
    """A string, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [{"text_input": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise invalid("prompt", "prompt must be a string, a list of token ids, or a list of either")
    if all(isinstance(item, str) for item in prompt):
        return [{"text_input": text} for text in prompt]
    if all(_is_id(item) for item in prompt):
        return [{"input_ids": prompt}]
    if all(isinstance(item, list) and item and all(map(_is_id, item)) for item in prompt):
        return [{"input_ids": item} for item in prompt]
    raise invalid("prompt", "prompt must be a string, a list of token ids, or a list of either, not a mixture")


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31


def _check_format(body: Mapping[str, Any]) -> None:
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else wanted
    if kind not in (None, "text"):
        raise unsupported("response_format", "response_format may be text only: answers are not forced into a schema")
    modalities = body.get("modalities")
    if modalities not in (None, ["text"]):
        raise unsupported("modalities", 'modalities may be ["text"] only')
