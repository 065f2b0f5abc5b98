#!/usr/bin/env bash
# Install APAR and NVIDIA's Triton server into environments of their own (.venv-demo, .venv-triton), serve the bundled tiny
# model and let it answer, branches live:
#
#   scripts/demo.sh ["a prompt"] [option of `apar demo`...]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

find_python
ensure_compiler
lock_build
use_venv .venv-demo ""
if [ -n "$venv_fresh" ]; then
  pip_install "${build_tools[@]}"
fi
install_apar "$(digest_of export runtime plugins triton_repo pyproject.toml)" '.[serve]'
seal_venv
served=1
if [ -z "${APAR_TRITONSERVER:-}" ] && ! command -v tritonserver >/dev/null && [ ! -x /opt/tritonserver/bin/tritonserver ]; then
  install_triton || served=
fi
unlock_build

if [ -n "$served" ]; then
  exec "$venv/bin/apar" demo "$@"
fi
say "so the model answers here without a server"
if [ $# = 0 ]; then
  set -- "Give me four facts about owls."
  if [ -t 1 ]; then
    set -- "$@" --pace 0.08 # the tiny model writes hundreds of tokens a second: too fast to watch
  fi
fi
exec "$venv/bin/apar" generate tiny "$@"
