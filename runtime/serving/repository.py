"""Copies of the model repository with parameters written into them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from apar.export.errors import AparError
from apar.runtime.serving.engine.settings import SettingsError

MODELS = ("apar", "ensemble", "tensorrt_llm_bls", "tensorrt_llm")
"""Every model of the repository; the first one has the engine."""
CONFIG_NAME = "config.pbtxt"

_PARAMETER = re.compile(r'parameters: \{ key: "(\w+)" value: \{ string_value: ("(?:[^"\\]|\\.)*") \} \}')


def repository_source() -> Path:
    """The repository that came with this package or checkout. Raises AparError if there is none."""
    source = Path(__file__).resolve().parents[2] / "triton_repo"
    if not (source / MODELS[0] / CONFIG_NAME).is_file():
        raise AparError(f"{source} is no model repository of apar; install the package again")
    return source


def write_repository(target: Path, parameters: Mapping[str, str] | None = None, models: Sequence[str] = MODELS) -> None:
    """Write a model repository to `target`, which must not exist or be empty.

    parameters: name -> text, written into the configurations of those models that have a parameter of that name.
    models: which models; "apar" must be among them.
    Raises SettingsError for an unknown model or parameter, AparError where `target` is in use.
    """
    source = repository_source()
    unknown = [model for model in models if model not in MODELS]
    if unknown or MODELS[0] not in models:
        raise SettingsError(f"models must be some of {', '.join(MODELS)}, and {MODELS[0]} among them")
    if target.exists() and any(target.iterdir()):
        raise AparError(f"{target} is not empty; name a new directory for the model repository")
    left = dict(parameters or {})
    texts = {}
    for model in models:
        text = (source / model / CONFIG_NAME).read_text(encoding="utf-8")
        texts[model], used = _fill(text, parameters or {})
        for name in used:
            left.pop(name, None)
    if left:
        raise SettingsError(
            f"no model has a parameter {', '.join(sorted(left))}; see {CONFIG_NAME} for those there are"
        )
    for model, text in texts.items():
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / model / "1", target / model / "1", ignore=skip, dirs_exist_ok=True)
        (target / model / CONFIG_NAME).write_text(text, encoding="utf-8")


def read_parameters(config: Path) -> dict[str, str]:
    """The parameters of a configuration of ours, as they stand there."""
    return {name: json.loads(value) for name, value in _PARAMETER.findall(config.read_text(encoding="utf-8"))}


def _fill(text: str, parameters: Mapping[str, str]) -> tuple[str, set[str]]:
    used = set()

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in parameters:
            return match[0]
        used.add(name)
        # A string of protobuf's text format is written as one of JSON is, but for characters beyond ASCII.
        value = json.dumps(parameters[name], ensure_ascii=False)
        return f'parameters: {{ key: "{name}" value: {{ string_value: {value} }} }}'

    return _PARAMETER.sub(replace, text), used
