"""The engine as a process of its own, behind a Unix-domain socket: what the models of `triton_repo` talk to.

    python -m apar.runtime.serving.engine DIRECTORY

DIRECTORY holds `settings.json` (see `process`); the process puts its socket there and says on standard output, in one
line of JSON, that it is ready or why it cannot be. docs/triton.md describes the whole.
"""
