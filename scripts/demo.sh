#!/usr/bin/env bash
# Install APAR into an environment of its own (.venv-demo) and let the bundled tiny model answer, branches live:
#
#   scripts/demo.sh ["a prompt"] [option of `apar generate`...]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

find_python
ensure_compiler
lock_build
use_venv .venv-demo ""
if [ -n "$venv_fresh" ]; then
  pip_install "${build_tools[@]}"
fi
install_apar "$(digest_of export runtime plugins pyproject.toml)" .
seal_venv
unlock_build

if [ $# = 0 ]; then
  set -- "Give me four facts about owls."
  if [ -t 1 ]; then
    set -- "$@" --pace 0.08 # the tiny model writes hundreds of tokens a second: too fast to watch
  fi
fi
exec "$venv/bin/apar" generate tiny "$@"
