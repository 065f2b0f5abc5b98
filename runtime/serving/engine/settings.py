"""The parameters of a served engine, as texts from a model's config.pbtxt, checked and typed."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from apar.export.errors import AparError
from apar.runtime.limits import SchedulerLimits
from apar.runtime.service_level import ServiceLevel
from apar.runtime.speculative.options import DraftOptions


class SettingsError(AparError):
    """A parameter of a served engine is unknown or has a value that it cannot have."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a served engine is and what bounds it."""

    engine: str = "tiny"
    """Engine directory, checkpoint directory, or `tiny`."""
    executor: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the executor's constructor."""
    draft: DraftOptions = field(default_factory=DraftOptions)
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_requests: int = 512
    """Requests held at once, running and queued; more are refused."""
    step_timeout_s: int = 300
    """A step that runs longer means that the process hangs: it ends itself and is started again. 0: never."""


_LIMITS = ("max_rows", "max_step_tokens", "max_live_branches")
_POOLS = ("num_blocks", "kv_memory_mb", "host_blocks", "kv_host_memory_mb")
_NUMBERS = (*_LIMITS, "max_requests", "step_timeout_s", *_POOLS)
_SECONDS_AND_FACTORS = ("slo_first_token", "slo_latency")
_OPTIONS = ("device", "weights")
"""Arguments of the executor that have a parameter of their own."""
_TEXTS = (
    "engine",
    "executor",
    "executor_options",
    *_OPTIONS,
    "draft",
    "draft_options",
    "prefix_caching",
    "fork_policy",
)
NAMES = (*_TEXTS, *_SECONDS_AND_FACTORS, *_NUMBERS)
"""Every parameter, by the name it has in config.pbtxt."""


def parse_settings(texts: Mapping[str, str]) -> Settings:
    """Settings from texts by name; an empty text stands for the default. Raises SettingsError or CapacityError."""
    for name in texts:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}"
            raise SettingsError(f"unknown parameter {name!r}; {hint}")
    given = {name: text.strip() for name, text in texts.items() if text.strip()}
    numbers = {name: _whole(name, given[name]) for name in _NUMBERS if name in given}
    values: dict[str, Any] = {name: given[name] for name in ("engine", "executor") if name in given}
    values.update((name, numbers[name]) for name in ("max_requests", "step_timeout_s") if name in numbers)
    if values.get("max_requests") == 0:
        raise SettingsError("max_requests is 0, so every request would be refused; write a number of at least 1")
    return Settings(**values, options=_options(given, numbers), draft=_draft(given), limits=_limits(given, numbers))


def _limits(given: Mapping[str, str], numbers: Mapping[str, int]) -> SchedulerLimits:
    values: dict[str, Any] = {name: numbers[name] for name in _LIMITS if name in numbers}
    defaults = SchedulerLimits()
    rows = values.get("max_rows", defaults.max_rows)
    # What goes with more rows, unless said otherwise.
    values.setdefault("max_step_tokens", max(defaults.max_step_tokens, 2 * rows))
    values.setdefault("max_live_branches", max(defaults.max_live_branches, 4 * rows))
    if "prefix_caching" in given:
        values["prefix_caching"] = _truth("prefix_caching", given["prefix_caching"])
    if "fork_policy" in given:
        values["fork_policy"] = given["fork_policy"]
    level = {name: _number(name, given[name]) for name in _SECONDS_AND_FACTORS if name in given}
    values["service_level"] = ServiceLevel(
        level.get("slo_first_token", defaults.service_level.first_token_seconds),
        level.get("slo_latency", defaults.service_level.latency_factor),
    )
    return SchedulerLimits(**values)


def _options(given: Mapping[str, str], numbers: Mapping[str, int]) -> dict[str, Any]:
    options = _object("executor_options", given, '{"threads": 4}')
    if "num_blocks" in numbers and "kv_memory_mb" in numbers:
        raise SettingsError("num_blocks and kv_memory_mb both size the KV pool; write one of them")
    if "host_blocks" in numbers and "kv_host_memory_mb" in numbers:
        raise SettingsError("host_blocks and kv_host_memory_mb both size the host tier; write one of them")
    options |= {name: given[name] for name in _OPTIONS if name in given}
    if "num_blocks" in numbers:
        options["num_blocks"] = numbers["num_blocks"]
    if "kv_memory_mb" in numbers:
        options["kv_memory_bytes"] = numbers["kv_memory_mb"] << 20
    if "host_blocks" in numbers:
        options["host_blocks"] = numbers["host_blocks"]
    if "kv_host_memory_mb" in numbers:
        options["kv_host_memory_bytes"] = numbers["kv_host_memory_mb"] << 20
    return options


def _draft(given: Mapping[str, str]) -> DraftOptions:
    options = _object("draft_options", given, '{"num_speculative_tokens": 8}')
    known = [entry.name for entry in fields(DraftOptions) if entry.name != "method"]
    for name in options:
        if name not in known:
            raise SettingsError(f"draft_options has no {name!r}; known are {', '.join(known)}")
    return DraftOptions(given.get("draft", "none"), **options)


def _object(name: str, given: Mapping[str, str], example: str) -> dict[str, Any]:
    if name not in given:
        return {}
    try:
        value = json.loads(given[name])
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{name} is no JSON ({error}); write an object such as {example}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{name} must be a JSON object such as {example}")
    return value


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise SettingsError(f"{name} is {text[:80]!r}; write a whole number, or nothing for the default")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SettingsError(f"{name} is {text[:80]!r}; write a number above 0, or nothing for the default")
    return number


def _truth(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise SettingsError(f"{name} is {text[:80]!r}; write true or false")
    return text.lower() == "true"
