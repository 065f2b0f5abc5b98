"""[Fork] and [Child]: found in the tokenizer by their strings, or named by the user."""

from __future__ import annotations

from apar.export.errors import TokenizerError
from apar.export.llama_config import LlamaConfig
from apar.export.manifest import TokenIds
from apar.export.tokenizer_files import TokenizerFiles

FORK_TOKEN = "[SplitMask]"
CHILD_TOKEN = "[SplitSop]"


def resolve_tokens(
    config: LlamaConfig,
    tokenizer: TokenizerFiles,
    fork_token: str | int | None = None,
    child_token: str | int | None = None,
) -> TokenIds:
    """Ids of the tokens that decoding must know. An option is a token's string or its id.

    Raises TokenizerError where a token is unknown, beyond the embedding, or not distinct from the others.
    """
    fork = _resolve("fork", fork_token, FORK_TOKEN, config, tokenizer)
    child = _resolve("child", child_token, CHILD_TOKEN, config, tokenizer)
    rows = config.decoder.vocab_size
    named = tokenizer.special_id("eos_token")  # a tuned model's tokenizer often knows an end that its config does not
    eos = tuple(dict.fromkeys((*config.eos, *(i for i in (named,) if i is not None and i < rows))))
    if not eos:
        raise TokenizerError(
            f"{tokenizer.directory}: no end token: neither config.json (eos_token_id) nor the tokenizer names one; "
            "add eos_token_id to config.json"
        )
    if fork == child:
        raise TokenizerError(f"the fork and the child token are the same, {fork}; give two different tokens")
    for name, token in (("fork", fork), ("child", child)):
        if token in eos:
            raise TokenizerError(f"the {name} token {token} is also an end token; give another one (--{name}-token)")
    bos = None
    if tokenizer.puts_bos:
        own = tokenizer.special_id("bos_token")
        bos = config.bos if own is None else own
    if bos is not None and bos >= rows:
        raise TokenizerError(
            f"{tokenizer.directory}: the begin token has id {bos}, but the model has only {rows} vocabulary rows; "
            "correct bos_token_id of config.json, or take the tokenizer that the model was trained with"
        )
    pad = config.pad if config.pad is not None else tokenizer.special_id("pad_token")
    if pad is not None and pad >= rows:
        pad = None  # some configs name a row that was never made; nothing is ever padded here
    return TokenIds(fork=fork, child=child, eos=eos, bos=bos, pad=pad)


def _resolve(name: str, option: str | int | None, default: str, config: LlamaConfig, tokenizer: TokenizerFiles) -> int:
    wanted = default if option is None else option
    token = tokenizer.ids.get(wanted) if isinstance(wanted, str) else wanted
    if token is None and isinstance(wanted, str) and wanted.isascii() and wanted.isdigit():
        token = int(wanted)
    if token is None:
        raise TokenizerError(
            f"{tokenizer.directory}: the tokenizer has no {name} token {wanted!r}; either use a checkpoint trained for "
            f"APAR whose tokenizer has it, or name the token that plays its part (--{name}-token STRING or ID)"
        )
    rows = config.decoder.vocab_size
    if not 0 <= token < rows:
        raise TokenizerError(
            f"{tokenizer.directory}: the {name} token {wanted!r} has id {token}, but the model has only {rows} "
            f"vocabulary rows; either resize the model's embeddings and train it, or name another token "
            f"(--{name}-token STRING or ID)"
        )
    return token
