"""Every error that APAR raises on purpose.

A message says what is wrong, where, and what to do about it. The command line prints the message
alone; a traceback means a defect of ours.
"""

from __future__ import annotations


class AparError(Exception):
    """Base of all errors that a user of APAR can cause or mend."""


class CheckpointError(AparError):
    """A checkpoint cannot be read or does not describe a model that APAR can build."""


class TokenizerError(AparError):
    """Tokenizer files are missing, unreadable, or lack the control tokens."""


class BuildError(AparError):
    """An engine cannot be built with the options given."""


class EngineError(AparError):
    """An engine directory is missing, incomplete, damaged, or of another version."""


class PluginError(AparError):
    """The native ForkAttention library is missing or does not fit the engine."""


class ExecutorError(AparError):
    """An executor cannot be loaded here, or a step failed inside it."""


class RequestError(AparError, ValueError):
    """A request (prompt or parameters) is not acceptable; no other request is affected."""


class CapacityError(RequestError):
    """A request can never fit: its prompt exceeds the context, or the KV pool is too small."""


class EngineStoppedError(AparError):
    """The engine's loop has stopped, so the request cannot be served."""


class ServingError(AparError):
    """The server cannot be found, installed, started or reached."""
