"""argparse as all commands use it: short errors, help that keeps its layout, options between positionals."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Parser of one command."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in two lines and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\nsee: {self.prog} --help\n")

    def add_debug(self) -> None:
        """Add `--debug`, which every command has."""
        self.add_argument("--debug", action="store_true", help="show tracebacks and the runtime's log")

    def parse_command(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command's arguments; the result has the parser as `parser`, for errors found later."""
        if any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return self.parse_args(arguments)
        options = self.parse_intermixed_args(arguments)
        options.parser = self
        return options


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions, and adds defaults that the help text does not speak of."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        plain = action.default in (None, argparse.SUPPRESS, False, [], ())
        if not plain and action.option_strings and "default" not in text:
            several = isinstance(action.default, list | tuple)
            text += f" (default: {' '.join(map(str, action.default))})" if several else " (default: %(default)s)"
        return text


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"{value} is not at least {low}" if high is None else f"{value} is not between {low} and {high}"
            )
        return value

    return parse


def seconds(text: str) -> float:
    """An argparse type: a time from 0 to 60 seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 60.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 60")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
