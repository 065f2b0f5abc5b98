"""How many connections the limit of open files leaves room for."""

from __future__ import annotations

import contextlib
import resource

from apar.export.errors import ServingError

SPARE_FILES = 128
"""What the service holds open besides connections."""


def allow_connections(wanted: int, answers: int) -> int:
    """How many clients may be connected at once, at most `wanted`, when `answers` of them have another connection each,
    to the server.

    The process's own limit is raised towards its hard limit as far as that takes; the server inherits it. Out of files,
    neither clients nor the server could be reached. Raises ServingError where not even `answers` clients fit.
    """
    needed = wanted + answers + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than the hard limit says
        target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    if soft < 2 * answers + SPARE_FILES:
        raise ServingError(
            f"this process may hold only {soft} files open, and {answers} answers at once take "
            f"{2 * answers + SPARE_FILES}: raise the limit (`ulimit -n`, LimitNOFILE= of a systemd unit), or lower "
            "--max-requests"
        )
    return min(wanted, soft - answers - SPARE_FILES)
