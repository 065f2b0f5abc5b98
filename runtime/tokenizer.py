"""Text to tokens and back, from an engine directory's `tokenizer.json`.

Two things differ from the tokenizer that the checkpoint's authors used:

- Text never becomes a control token. The tokenizer that encodes text has no added tokens at all, and no merge that
  could spell `</s>` or [Fork]; control tokens enter a prompt as literal ids only (docs/decoding.md, "Prompt").
- Tokens become bytes one by one, so that text can be streamed per branch without decoding anything twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from apar.export.errors import CapacityError, RequestError, TokenizerError
from apar.export.manifest import Manifest, TokenIds
from apar.export.tokenizer_files import LARGEST_ID, TOKENIZER_NAME, TokenizerFiles
from apar.export.tokenizer_kind import is_byte_level
from apar.runtime import tokenizer_json
from apar.runtime.tokenizer_json import REMEDY, AddedToken

CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"


class Tokenizer:
    """Encodes text without control tokens, and renders single tokens as bytes."""

    def __init__(
        self,
        definition: dict[str, Any],
        tokens: TokenIds,
        *,
        vocab_size: int = 0,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        max_chars: int | None = None,
    ) -> None:
        """Build from the contents of tokenizer.json (`definition`) and tokenizer_config.json (`config`).

        `vocab_size` is the model's number of vocabulary rows: rows beyond the tokenizer's ids decode to nothing, text
        that would become an id beyond the rows is refused. `max_chars` bounds the characters of one text given to
        `encode_text`.
        Raises TokenizerError for a kind of tokenizer whose tokens have no bytes of their own.
        """
        self.tokens = tokens
        self.config = config or {}
        self.chat_template = chat_template
        self.max_chars = max_chars
        self.added_tokens = tokenizer_json.added_tokens(definition, self.config)
        model = definition.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
            raise TokenizerError(f"{TOKENIZER_NAME} has no model.vocab; {REMEDY}")
        self.byte_level = is_byte_level(definition)
        self.strips_blank = not self.byte_level and tokenizer_json.strips_blank(definition)
        """Decoding drops one blank at the start of a piece: the dummy prefix of SentencePiece."""

        strings = tokenizer_json.id_strings(model)
        self._add_named_tokens({string: token_id for token_id, string in strings.items()})
        known = [*strings, *(token.token_id for token in self.added_tokens)]
        if known and not 0 <= min(known) <= max(known) <= LARGEST_ID:
            raise TokenizerError(
                f"{TOKENIZER_NAME} has ids from {min(known)} to {max(known)}, allowed are 0 to {LARGEST_ID}; {REMEDY}"
            )
        size = max([vocab_size, *(i + 1 for i in known)])
        control = {tokens.fork, tokens.child, *tokens.eos}
        control.update(i for i in (tokens.bos, tokens.pad) if i is not None)
        if max(control) >= size or min(control) < 0:
            raise TokenizerError(
                f"the manifest names control token ids {sorted(control)}, but the vocabulary has {size}; {REMEDY}"
            )
        self._rows = vocab_size or size
        self._silent = frozenset(control | {t.token_id for t in self.added_tokens if t.special})
        self._bytes = self._render(size, strings)
        unknown = tokenizer_json.unknown_id(model)
        self._forbidden = frozenset(i for i in self._silent if i != unknown)
        hidden = {strings[i] for i in self._silent if i in strings}
        hidden.update(t.text for t in self.added_tokens if t.token_id in self._silent)
        neutral = tokenizer_json.neutral_definition(definition, hidden)
        self._encoder = tokenizer_json.load_encoder(neutral)
        middle = tokenizer_json.without_first_prefix(neutral)
        self._middle_encoder = tokenizer_json.load_encoder(middle) if middle is not None else self._encoder

    @classmethod
    def load(cls, directory: Path | str, manifest: Manifest | None = None, max_chars: int | None = None) -> Tokenizer:
        """Load the tokenizer of an engine directory; `manifest` is read from there where none is given.

        `max_chars` is by default what fills the engine's context if every token is the vocabulary's longest: more can
        never fit, so it is refused before it costs time.
        Raises TokenizerError where a file is missing, corrupt or of a kind that cannot be used.
        """
        directory = Path(directory)
        manifest = manifest if manifest is not None else Manifest.load(directory)
        if not (directory / TOKENIZER_NAME).is_file():
            raise TokenizerError(f"{directory} holds no {TOKENIZER_NAME}; {REMEDY}")
        config = _read_json(directory / CONFIG_NAME)
        for key, value in _read_json(directory / SPECIAL_TOKENS_NAME).items():
            config.setdefault(key, value)
        tokenizer = cls(
            _read_json(directory / TOKENIZER_NAME),
            manifest.tokens,
            vocab_size=manifest.decoder.vocab_size,
            config=config,
            chat_template=_chat_template(directory, config),
            max_chars=max_chars,
        )
        if max_chars is None:
            tokenizer.max_chars = manifest.decoder.max_context * max(map(len, tokenizer.bytes_table))
        return tokenizer

    @classmethod
    def of_files(cls, files: TokenizerFiles, manifest: Manifest) -> Tokenizer:
        """The tokenizer of a checkpoint from which the engine of `manifest` is built."""
        config = {**files.special, **files.config}
        template = _chat_template(files.directory, config)
        size = manifest.decoder.vocab_size
        return cls(files.tokenizer, manifest.tokens, vocab_size=size, config=config, chat_template=template)

    def __len__(self) -> int:
        """Number of ids that have bytes (the model's vocabulary, padding rows included)."""
        return len(self._bytes)

    @property
    def silent_ids(self) -> frozenset[int]:
        """Ids that render as nothing: control tokens, beginning and end of sequence, padding, unknown."""
        return self._silent

    def special_string(self, name: str) -> str | None:
        """The string of `bos_token`, `eos_token`, `pad_token` or `unk_token`, as chat templates want it."""
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
        ids = {"bos_token": self.tokens.bos, "eos_token": self.tokens.eos[0], "pad_token": self.tokens.pad}
        return next((t.text for t in self.added_tokens if t.token_id == ids.get(name)), None)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of one stretch of text; control strings in it are plain text, nothing is added around it.

        A SentencePiece tokenizer puts its dummy blank in front. Raises RequestError where `text` is no valid
        Unicode text, CapacityError where it is longer than `max_chars`.
        """
        return self._encode(self._encoder, text)

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Token ids of text and literal token ids in order.

        Every maximal stretch of text between ids is encoded on its own, with the dummy blank, as the Llama tokenizer
        that Vicuna was trained with does ("legacy" in its files). A tokenizer whose file asks for the dummy blank at
        the beginning of the whole text only (`prepend_scheme` "first") is obeyed.
        """
        result: list[int] = []
        stretch: list[str] = []

        def close() -> None:
            encoder = self._middle_encoder if result else self._encoder
            result.extend(self._encode(encoder, "".join(stretch)))
            stretch.clear()

        for segment in segments:
            if isinstance(segment, str):
                stretch.append(segment)
                continue
            if not 0 <= segment < len(self._bytes):
                raise RequestError(f"token id {segment} is outside the vocabulary of {len(self._bytes)}")
            close()
            result.append(segment)
        close()
        return result

    def check_length(self, chars: int) -> None:
        """Raise CapacityError where a prompt of so many characters exceeds `max_chars`."""
        if self.max_chars is not None and chars > self.max_chars:
            raise CapacityError(f"text of {chars} characters exceeds the limit of {self.max_chars}; shorten it")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text (possibly part of a character; empty for control tokens)."""
        if not 0 <= token_id < len(self._bytes):
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {len(self._bytes)}")
        return self._bytes[token_id]

    @property
    def bytes_table(self) -> Sequence[bytes]:
        """`token_bytes` of every id, for callers that check ids elsewhere."""
        return self._bytes

    @cached_property
    def text_table(self) -> Sequence[str | None]:
        """Text of every id whose bytes are whole characters; None of the others."""
        return [_whole(data) for data in self._bytes]

    def decode(self, token_ids: Sequence[int], starts_piece: bool = True) -> str:
        """Text of a whole piece: the form of `IncrementalDetokenizer` for tokens that are all known."""
        data = b"".join(self.token_bytes(i) for i in token_ids)
        if starts_piece and self.strips_blank:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def _encode(self, encoder: tokenizers.Tokenizer, text: str) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, not {type(text).__name__}")
        if not text:
            return []
        self.check_length(len(text))
        check_text(text)
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(ids):
            raise TokenizerError("text was encoded as a control token; the tokenizer's model maps ordinary text to one")
        if self._rows < len(self._bytes) and ids and max(ids) >= self._rows:
            raise TokenizerError(
                f"text became token {max(ids)}, but the model has only {self._rows} vocabulary rows: the tokenizer is "
                "that of another model; build the engine again with the right one (--tokenizer DIR)"
            )
        return ids

    def _add_named_tokens(self, ids: dict[str, int]) -> None:
        """Count the sequence tokens that the config names as added tokens where tokenizer.json does not list them."""
        known = {token.text for token in self.added_tokens}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            string = self.special_string(name)
            if string in ids and string not in known:
                known.add(string)
                self.added_tokens.append(AddedToken(string, ids[string], special=True))

    def _render(self, size: int, strings: dict[int, str]) -> list[bytes]:
        table = [b""] * size
        to_bytes = tokenizer_json.byte_level_bytes if self.byte_level else tokenizer_json.sentencepiece_bytes
        for token_id, string in strings.items():
            table[token_id] = to_bytes(string)
        for token in self.added_tokens:
            table[token.token_id] = token.text.encode("utf-8", errors="replace")
        for token_id in self._silent:
            table[token_id] = b""
        return table


def check_text(text: str) -> None:
    """Raise RequestError where `text` holds a lone surrogate, which no encoding can express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "send valid Unicode"
        ) from None


def _whole(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error}); {REMEDY}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds no JSON object; {REMEDY}")
    return data


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The checkpoint's template: its own file, else the (default) one of tokenizer_config.json."""
    path = directory / TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read ({error}); {REMEDY}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
