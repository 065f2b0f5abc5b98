"""What the Triton server and its children print: kept, searched for load errors, passed on where it matters."""

from __future__ import annotations

import logging
import re
from collections import deque

logger = logging.getLogger("apar.serving.triton")

KEPT_LINES = 400
_SERVERS_OWN = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?P<place>[\w.]+:\d+)\]")
_LOAD_FAILURE = re.compile(r"failed to load '(?P<model>[^']*)' version \d+: (?P<reason>.*?)\"?$")
_CALM = re.compile(r"^apar[\w .]*: (INFO|DEBUG|\w+: ready)\b")
"""What models and engine say when all is well."""
_NOISE = (
    "CudaDriverHelper has not been initialized",
    "Failed to initialize NVML",
    "Signal (15) received",
    "Failed to create instance",
    "error: creating server",
)
"""What it says on a machine without a GPU, or when it is told to end, and what it says twice."""


class ServerLog:
    """The latest lines. The server's own errors, and what models and engine say, reach the log of APAR."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._failures: list[str] = []
        self.expects_death = False
        """Set when its processes are killed: what they cry out then is of no interest."""

    def add(self, line: str) -> None:
        """Take in one line."""
        line = line.rstrip()
        if not line:
            return
        self._lines.append(line)
        found = _SERVERS_OWN.match(line)
        failure = _LOAD_FAILURE.search(line) if found else None
        if failure:
            self._failures.append(f"model {failure['model']}: {_sentence(failure['reason'])}")
        if self.expects_death or any(noise in line for noise in _NOISE) or line[0] in "+|" or _CALM.match(line):
            level = logging.DEBUG
        elif found:
            level = logging.ERROR if line[0] in "EF" and not failure else logging.DEBUG
        else:
            level = logging.INFO
        logger.log(level, "%s", line)

    def load_failure(self) -> str | None:
        """The sentence with which a model refused to load, if one did."""
        return "; ".join(dict.fromkeys(self._failures)) or None

    def tail(self, count: int = 15) -> str:
        """The latest lines that are no tables."""
        lines = [line for line in self._lines if line[0] not in "+|" and not any(n in line for n in _NOISE)]
        return "\n".join(lines[-count:])


def _sentence(reason: str) -> str:
    """A reason as its author wrote it, without the server's escapes, class names and traceback."""
    text = reason.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")
    text = text.partition("\n\nAt:\n")[0].strip()
    text = re.sub(r"^(Internal|Invalid argument|Not found|Unavailable): ", "", text)
    return re.sub(r"^TritonModelException: ", "", text)
