"""The tokenizer's files in an engine: always `tokenizer.json`, whatever the checkpoint has.

A checkpoint brings `tokenizer.json`, or `tokenizer.model` (sentencepiece), which is converted. Tokens that
only `added_tokens.json` or `tokenizer_config.json` know are added to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apar.export.errors import CheckpointError, TokenizerError
from apar.export.llama_config import read_json
from apar.export.sentencepiece_model import convert_model, read_model
from apar.export.tokenizer_kind import is_byte_level, parts

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
MODEL_NAME = "tokenizer.model"
LARGEST_ID = 1 << 24
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer, complete in memory."""

    directory: Path
    """Where it was read from."""
    tokenizer: dict[str, Any]
    """Contents of `tokenizer.json`."""
    config: dict[str, Any]
    """Contents of `tokenizer_config.json`, with the chat template where there is one."""
    special: dict[str, Any]
    """Contents of `special_tokens_map.json`."""

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Id of each token by its string."""
        model = self.tokenizer["model"]["vocab"]
        ids = dict(model) if isinstance(model, dict) else {piece[0]: i for i, piece in enumerate(model)}
        return ids | {token["content"]: token["id"] for token in self.tokenizer.get("added_tokens") or ()}

    def special_id(self, role: str) -> int | None:
        """Id of the token that plays `role` (such as `eos_token`), or None."""
        value = self.special.get(role, self.config.get(role))
        text = value.get("content") if isinstance(value, dict) else value
        return self.ids.get(text) if isinstance(text, str) else None

    @property
    def puts_bos(self) -> bool:
        """Whether encoding a text puts the begin token in front of it.

        `add_bos_token` false says no; else what tokenizer.json does after encoding; else Llama's tokenizers do and no
        others. (transformers 4 and 5 read the three differently; where they agree, this is what they agree on.)
        """
        if self.config.get("add_bos_token") is False:
            return False
        stages = parts(self.tokenizer.get("post_processor"), "processors")
        templates = [stage["single"] for stage in stages if isinstance(stage.get("single"), list)]
        if templates:
            return any(isinstance(piece, dict) and "SpecialToken" in piece for piece in templates[0][:1])
        return "Llama" in str(self.config.get("tokenizer_class") or "Llama")

    def texts(self) -> Iterator[tuple[str, str]]:
        """Name and contents of the three files of an engine."""
        for name, data in ((TOKENIZER_NAME, self.tokenizer), (CONFIG_NAME, self.config), (SPECIAL_NAME, self.special)):
            yield name, json.dumps(data, ensure_ascii=False, indent=None if name == TOKENIZER_NAME else 2) + "\n"

    def write(self, directory: Path) -> None:
        """Write the three files into `directory`."""
        for name, text in self.texts():
            (directory / name).write_text(text, encoding="utf-8")


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Read a checkpoint's tokenizer, converting it where need be.

    Raises TokenizerError that names the file and what to do, also for kinds that APAR cannot run.
    """
    try:
        config = _optional(directory / CONFIG_NAME)
        special = _optional(directory / SPECIAL_NAME)
        added = _added_tokens(directory, config)
        _add_chat_template(directory, config)
        if (directory / TOKENIZER_NAME).is_file():
            tokenizer = read_json(directory / TOKENIZER_NAME)
        elif (directory / MODEL_NAME).is_file():
            tokenizer = convert_model(read_model(directory / MODEL_NAME), config)
        else:
            raise TokenizerError(
                f"{directory} has neither {TOKENIZER_NAME} nor {MODEL_NAME}; copy the tokenizer's files there "
                "from the model that the checkpoint was tuned from"
            )
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    _merge(tokenizer, added, directory)
    is_byte_level(tokenizer)
    for role in _SPECIALS:
        if role not in special and config.get(role) is not None:
            special[role] = config[role]
    files = TokenizerFiles(directory, tokenizer, config, special)
    try:
        for _, text in files.texts():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{directory}: the tokenizer's files hold a lone surrogate ({error.object[error.start]!r}), which is no "
            "text; copy the tokenizer again"
        ) from error
    return files


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens that stand beside the vocabulary, by id, in the form of tokenizer.json."""
    added: dict[int, dict[str, Any]] = {}
    try:
        for text, token in _optional(directory / ADDED_NAME).items():
            added[int(token)] = {"content": str(text)}
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            added[int(token)] = {"content": str(entry["content"]), "special": bool(entry.get("special", False))}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(
            f"{directory}: its list of added tokens is damaged ({error}); copy the tokenizer again"
        ) from error
    return added


def _add_chat_template(directory: Path, config: dict[str, Any]) -> None:
    """A template in a file of its own wins over the one in tokenizer_config.json, as in transformers."""
    jinja, old = directory / "chat_template.jinja", directory / "chat_template.json"
    if jinja.is_file():
        try:
            config["chat_template"] = jinja.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{jinja} cannot be read ({error}); copy it again") from error
    elif old.is_file() and (template := read_json(old).get("chat_template")):
        config["chat_template"] = template
    template = config.get("chat_template")
    if isinstance(template, list):  # several, of which the one named default is meant for conversations
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
        if not isinstance(template, str):
            raise TokenizerError(
                f"{directory / CONFIG_NAME} has no chat template named 'default', only "
                f"{', '.join(map(repr, named)) or 'none'}; put the one to use into {jinja.name}"
            )
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{directory / CONFIG_NAME}: chat_template is no text; put the template into {jinja.name}")
    if template:
        config["chat_template"] = template
    else:
        config.pop("chat_template", None)


def _merge(tokenizer: dict[str, Any], added: Mapping[int, Mapping[str, Any]], directory: Path) -> None:
    """Put `added` into the tokenizer where it does not know the string yet."""
    try:
        tokens = tokenizer.setdefault("added_tokens", [])
        vocab = tokenizer["model"]["vocab"]
        strings = {token["content"]: token["id"] for token in tokens}
        taken = {token["id"]: token["content"] for token in tokens}
        names = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        taken |= {token: text for text, token in names.items()}
        if not all(0 <= token <= LARGEST_ID for token in (*taken, *added)):
            raise ValueError(f"ids are not between 0 and {LARGEST_ID}")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise TokenizerError(f"{directory / TOKENIZER_NAME} is no tokenizer ({error!r}); copy it again") from error
    for token, entry in sorted(added.items()):
        text = entry["content"]
        if strings.get(text, token) != token:
            raise TokenizerError(
                f"{directory}: token {text!r} has id {token} in one file and {strings[text]} in {TOKENIZER_NAME}; "
                "copy the tokenizer's files from one place"
            )
        if text in strings:
            continue
        if taken.get(token, text) != text:
            raise TokenizerError(
                f"{directory}: added token {text!r} has id {token}, which {taken[token]!r} has already; "
                "copy the tokenizer's files from one place"
            )
        tokens.append(
            {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": entry.get("special", False)}
        )
    tokens.sort(key=lambda token: int(token["id"]))
