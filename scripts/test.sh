#!/usr/bin/env bash
# Lint, type-check and test everything in an environment of its own (.venv-test):
#
#   scripts/test.sh                      all of it
#   scripts/test.sh -k scheduler -x      only pytest, with these arguments
#
# Environment: APAR_TORCH_SPEC (what pip installs as torch), and what lib.sh names.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

torch_spec=${APAR_TORCH_SPEC:-torch==2.13.0}
if [ "$(uname -sm)" = "Linux x86_64" ]; then
  : "${APAR_NATIVE:=REQUIRED}" # a test run without the kernels would look green and prove little
fi

find_python
ensure_compiler
lock_build
use_venv .venv-test "$torch_spec"
if [ -n "$venv_fresh" ]; then
  say "installing $torch_spec and the test tools (some minutes the first time)"
  # torch first and alone: resolved together with the rest, pip might take another build of it.
  pip_install "$torch_spec" "${build_tools[@]}"
  install_apar "$(digest_of plugins pyproject.toml)" -e '.[test]'
  seal_venv
fi
install_apar "$(digest_of plugins pyproject.toml)" --no-deps -e .
if [ "$(uname -sm)" = "Linux x86_64" ] && [ -z "${APAR_TRITONSERVER:-}" ]; then
  install_triton # without a server the serving tests fail
fi
if [ "$(uname -sm)" = "Linux x86_64" ]; then
  fetch_tensorrt_bindings
fi
unlock_build

lint=passed
if [ $# = 0 ]; then
  scripts/lint.sh "$venv_python" || lint=failed
fi
tests=passed
"$venv_python" -m pytest "$@" </dev/null || tests=failed
[ "$lint" = passed ] || printf 'error: lint failed, see above\n' >&2
[ "$lint $tests" = "passed passed" ]
